"""How replicas share their steps between online and bulk work, under ``/metrics``: what replicas reported last.

Replicas are named by their id, so that every ingress process shows the same series.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hycluster.core import ColocationLoad

_REPLICA = ["model", "replica"]
# Of ``ColocationLoad.step_time_s``.
STEP_TERMS = ("base", "prefill_token", "sequence", "kv_token")


class ColocatedPool(Protocol):
    """What knows the last reports of one model's replicas."""

    @property
    def colocation_loads(self) -> Mapping[str, ColocationLoad]:
        """By replica id; replicas that report none are left out."""


class ColocationMetrics(Collector):
    """Reads the pools when it is asked; holds none of them."""

    def __init__(self) -> None:
        self._pools: WeakValueDictionary[str, ColocatedPool] = WeakValueDictionary()

    def watch(self, model: str, pool: ColocatedPool) -> None:
        """Show this model's replicas for as long as ``pool`` lives."""
        self._pools[model] = pool

    def collect(self) -> Iterable[Metric]:
        parked = GaugeMetricFamily(
            "hycluster_batch_rows_parked",
            "Running batch requests that got no token in the last step, because online requests needed it.",
            labels=_REPLICA,
        )
        given_up = CounterMetricFamily(
            "hycluster_batch_rows_preempted",
            "Batch requests that lost their slot and KV blocks to an online request, and are computed again.",
            labels=_REPLICA,
        )
        tokens = CounterMetricFamily(
            "hycluster_engine_tokens", "Prompt and output tokens computed.", labels=[*_REPLICA, "priority"]
        )
        step = GaugeMetricFamily(
            "hycluster_engine_step_seconds", "Duration of the last step.", labels=[*_REPLICA, "kind"]
        )
        learned = GaugeMetricFamily(
            "hycluster_engine_step_coefficient_seconds",
            "What a step takes, as learned: base, and for each token of prefill, sequence and token of KV cache read.",
            labels=[*_REPLICA, "term"],
        )
        for model, pool in list(self._pools.items()):
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
        return [family for family in (parked, given_up, tokens, step, learned) if family.samples]

    def describe(self) -> Iterable[Metric]:
        # Registering must not read values.
        return []


colocation_metrics = ColocationMetrics()
REGISTRY.register(colocation_metrics)
