"""How a pool that follows its load is sized, under ``/metrics``: what each ingress process has heard of the pool's
scaler.

All ingress processes hear the same, so the labels have no gateway; only what waits is each gateway's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakValueDictionary

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hycluster.directory.autoscaling import Scaling


class LastScaling(Protocol):
    """Where the scaler's last word is."""

    scaling: Scaling | None


class ScaledPool(Protocol):
    """Where the gateway's requests are."""

    gateway_id: str

    @property
    def requests_waiting(self) -> int: ...


class Scaled(Protocol):
    """A gateway of a pool that follows its load."""

    @property
    def cold_start(self) -> LastScaling: ...

    @property
    def engine_core(self) -> ScaledPool: ...


class ScalingMetrics(Collector):
    """Reads the gateways when it is asked; holds none of them."""

    def __init__(self) -> None:
        self._gateways: WeakValueDictionary[str, Scaled] = WeakValueDictionary()

    def watch(self, model: str, gateway: Scaled) -> None:
        """Show this model for as long as ``gateway`` lives."""
        self._gateways[model] = gateway

    def collect(self) -> Iterable[Metric]:
        target = GaugeMetricFamily(
            "hycluster_replicas_target", "Number of replicas that the autoscaler wants.", labels=["model"]
        )
        running = GaugeMetricFamily(
            "hycluster_replicas_running", "Number of replicas that have started.", labels=["model"]
        )
        cold_start = GaugeMetricFamily(
            "hycluster_cold_start_seconds", "Duration of the latest replica start.", labels=["model"]
        )
        decisions = CounterMetricFamily(
            "hycluster_scaling_decisions",
            "Changes of the number of replicas wanted, by cause: wake, tokens, kv_cache, queue, quiet, idle, bounds.",
            labels=["model", "cause"],
        )
        waiting = GaugeMetricFamily(
            "hycluster_requests_without_replica",
            "Requests that wait in a gateway because no replica is running.",
            labels=["model", "gateway"],
        )
        for model, gateway in list(self._gateways.items()):
            pool, scaling = gateway.engine_core, gateway.cold_start.scaling
            waiting.add_metric([model, pool.gateway_id], pool.requests_waiting)
            if scaling is None:
                continue
            target.add_metric([model], scaling.target)
            running.add_metric([model], scaling.running)
            if scaling.cold_start_s is not None:
                cold_start.add_metric([model], scaling.cold_start_s)
            for cause, count in scaling.decisions.items():
                decisions.add_metric([model, cause], count)
        return [target, running, cold_start, decisions, waiting]

    def describe(self) -> Iterable[Metric]:
        # Registering must not read values.
        return []


scaling_metrics = ScalingMetrics()
REGISTRY.register(scaling_metrics)
