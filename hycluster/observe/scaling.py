"""How a pool that follows its load is sized, under ``/metrics``: what the directory has told of the pool's scaler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.directory.autoscaling import Scaling
from hycluster.observe.catalogue import COLD_START, DECISIONS, INGRESS, RUNNING, TARGET, WAITING
from hycluster.observe.watched import Watching


class LastScaling(Protocol):
    """Where the scaler's last word is."""

    scaling: Scaling | None


class ScaledPool(Protocol):
    """Where the gateway's requests are.

    Attributes:
        shows_pool: this process shows what concerns the pool; else another one does.
    """

    shows_pool: bool

    @property
    def requests_waiting(self) -> int: ...


class Scaled(Protocol):
    """A gateway of a pool that follows its load."""

    @property
    def cold_start(self) -> LastScaling: ...

    @property
    def engine_core(self) -> ScaledPool: ...


class ScalingMetrics(Watching[Scaled]):
    """Of all models whose pools follow their load."""

    def collect(self) -> Iterable[Metric]:
        target, running, cold_start = TARGET.gauge(), RUNNING.gauge(), COLD_START.gauge()
        decisions, waiting = DECISIONS.counter(), WAITING.gauge()
        for model, gateway in self.sources:
            pool, scaling = gateway.engine_core, gateway.cold_start.scaling
            waiting.add_metric([model, INGRESS], pool.requests_waiting)
            if scaling is None or not pool.shows_pool:
                continue
            target.add_metric([model], scaling.target)
            running.add_metric([model], scaling.running)
            if scaling.cold_start_s is not None:
                cold_start.add_metric([model], scaling.cold_start_s)
            for cause, count in scaling.decisions.items():
                decisions.add_metric([model, cause], count)
        return [family for family in (target, running, cold_start, decisions, waiting) if family.samples]


scaling_metrics = ScalingMetrics()
REGISTRY.register(scaling_metrics)
