"""What limits refused in this process, under ``/metrics``. Whose they are is nobody's to read there."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hycluster.auth.limits import KINDS
from hycluster.limits.limiter import refused
from hycluster.observe.catalogue import INGRESS, LIMITED

OWNERS = ("key", "project", "tenant")


class LimitMetrics(Collector):
    """Of all limits, once one of them has refused anything."""

    def collect(self) -> Iterable[Metric]:
        family = LIMITED.counter()
        for kind in KINDS if refused else ():
            for of in OWNERS:
                family.add_metric([kind, of, INGRESS], refused[kind, of])
        return [family] if family.samples else []

    def describe(self) -> Iterable[Metric]:
        return []


REGISTRY.register(LimitMetrics())
