"""What became of this process's spans, under ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.observe.catalogue import INGRESS, SPANS_LOST
from hycluster.observe.watched import Watching


class CountedSpans(Protocol):
    """Who sends them.

    Attributes:
        lost: that no collector has, and will not have.
    """

    @property
    def lost(self) -> int: ...


class SpanMetrics(Watching[CountedSpans]):
    """Of this process, where it exports."""

    def collect(self) -> Iterable[Metric]:
        lost = SPANS_LOST.counter()
        for _, spans in self.sources:
            lost.add_metric([INGRESS], spans.lost)
        return [lost] if lost.samples else []


span_metrics = SpanMetrics()
REGISTRY.register(span_metrics)
