"""How replicas share their steps between online and bulk work, and which jobs have rows in them, under ``/metrics``:
what replicas and gateways reported last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.core import BulkDemand, ColocationLoad, ReplicaLoad
from hycluster.observe.catalogue import (
    ENGINE_TOKENS,
    JOB_DEADLINE,
    JOB_ROWS,
    PARKED,
    PREEMPTED,
    STEP_COEFFICIENTS,
    STEP_SECONDS,
)
from hycluster.observe.watched import Watching

# Of ``ColocationLoad.step_time_s``.
STEP_TERMS = ("base", "prefill_token", "sequence", "kv_token")


class ColocatedPool(Protocol):
    """What knows the last reports of one model's replicas.

    Attributes:
        shows_pool: this process shows what concerns the pool; else another one does.
    """

    shows_pool: bool

    @property
    def jobs(self) -> Mapping[str, Mapping[str, BulkDemand]]:
        """By gateway, what each of its jobs has and wants."""

    @property
    def colocation_loads(self) -> Mapping[str, ColocationLoad]:
        """By replica id; replicas that report none are left out."""

    @property
    def gone_loads(self) -> Mapping[str, ReplicaLoad]:
        """By replica id, what those that are gone had reported last."""


class ColocationMetrics(Watching[ColocatedPool]):
    """Of all models."""

    def collect(self) -> Iterable[Metric]:
        parked, given_up, tokens = PARKED.gauge(), PREEMPTED.counter(), ENGINE_TOKENS.counter()
        step, learned, rows, late = (
            STEP_SECONDS.gauge(),
            STEP_COEFFICIENTS.gauge(),
            JOB_ROWS.gauge(),
            JOB_DEADLINE.gauge(),
        )
        for model, pool in self.sources:
            if not pool.shows_pool:
                continue
            for replica, load in pool.colocation_loads.items():
                labels = [model, replica]
                parked.add_metric(labels, load.parked)
                given_up.add_metric(labels, load.given_up)
                tokens.add_metric([*labels, "online"], load.online_tokens)
                tokens.add_metric([*labels, "batch"], load.bulk_tokens)
                step.add_metric([*labels, "measured"], load.real_step_s)
                step.add_metric([*labels, "predicted"], load.predicted_step_s)
                if any(load.step_time_s):
                    for term, seconds in zip(STEP_TERMS, load.step_time_s, strict=True):
                        learned.add_metric([*labels, term], seconds)
            for replica, gone in pool.gone_loads.items():
                if gone.colocation is not None and replica not in pool.colocation_loads:
                    given_up.add_metric([model, replica], gone.colocation.given_up)
                    tokens.add_metric([model, replica, "online"], gone.colocation.online_tokens)
                    tokens.add_metric([model, replica, "batch"], gone.colocation.bulk_tokens)
            for job, demands in _by_job(pool.jobs).items():
                rows.add_metric([model, job], sum(demand.rows for demand in demands))
                if deadlines := [demand.urgent_at for demand in demands if demand.urgent_at is not None]:
                    late.add_metric([model, job], min(deadlines))
        return [family for family in (parked, given_up, tokens, step, learned, rows, late) if family.samples]


def _by_job(jobs: Mapping[str, Mapping[str, BulkDemand]]) -> dict[str, list[BulkDemand]]:
    found: dict[str, list[BulkDemand]] = defaultdict(list)
    for demands in jobs.values():
        for job, demand in demands.items():
            found[job].append(demand)
    return found


colocation_metrics = ColocationMetrics()
REGISTRY.register(colocation_metrics)
