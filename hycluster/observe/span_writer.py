"""Spans as OpenTelemetry's SDK sends them. Imports the SDK, so only who has somewhere to send to imports it.

They are made whole: a tracer's ``start_span``, ``add_event`` and ``end`` decide, lock and copy what is settled here,
and took twice as long as all the rest of a span.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from hycluster import __version__
from hycluster.observe.spans import SpanOf, spans_of
from hycluster.timeline import Timeline

CLOSE_WITHIN_S = 5.0
# Spans that wait to be sent; OpenTelemetry's own default.
MOST_WAITING = 2048
SAMPLED, UNSET = TraceFlags(TraceFlags.SAMPLED), Status(StatusCode.UNSET)


class OwnResource(Resource):
    """Knows its hash, which is asked for with each span and would be that of all of it as JSON."""

    def __hash__(self) -> int:
        return id(type(self))


class _Counted(SpanExporter):
    """Another exporter, and what became of what it was given.

    Attributes:
        given: spans that it has tried to send.
        failed: those of them that no collector took.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.given = self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.given += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class SpanWriter:
    """Spans with ids and times that are given, in the name of one process.

    Args:
        process: what it is for, such as ``ingress``.
        instance: which one of these; empty for none.
    """

    def __init__(self, exporter: SpanExporter, process: str, instance: str = "") -> None:
        described = {"service.name": f"hycluster-{process}", "service.version": __version__}
        if instance:
            described["service.instance.id"] = instance
        # Which ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` overrule.
        resource = Resource(described).merge(OTELResourceDetector().detect())
        self._resource = OwnResource(resource.attributes, resource.schema_url)
        self._scope = InstrumentationScope("hycluster", __version__)
        # What ``OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT`` and its like say.
        self._limits = SpanLimits()
        self._exporter = _Counted(exporter)
        self._most_waiting = _most_waiting()
        self._written = self._dropped = 0
        self._processor = BatchSpanProcessor(self._exporter, self._most_waiting)

    def write(self, timeline: Timeline) -> None:
        """Those of a request that has ended."""
        said = timeline.context.state
        state = TraceState.from_header([said] if said else [])
        # Seconds since 1970 are known to a quarter of a microsecond: what ends with its parent may seem to end later.
        times_ns: dict[int, tuple[int, int]] = {}
        for span in spans_of(timeline):
            start_ns, end_ns = times_ns.get(span.parent, (0, sys.maxsize))
            within = max(start_ns, _ns(span.start_s)), min(end_ns, _ns(span.end_s))
            times_ns[span.span_id] = within
            # The processor says so in the log alone, for each.
            if self._written - self._dropped - self._exporter.given >= self._most_waiting:
                self._dropped += 1
            self._written += 1
            self._processor.on_end(self._made(span, timeline.trace_id, state, *within))

    @property
    def lost(self) -> int:
        """Spans that no collector took, or that came while one was away and too many waited for it."""
        return self._dropped + self._exporter.failed

    def _made(self, span: SpanOf, trace_id: int, state: TraceState, start_ns: int, end_ns: int) -> ReadableSpan:
        remote, limits = span.kind == "SERVER", self._limits
        return ReadableSpan(
            span.name,
            SpanContext(trace_id, span.span_id, False, SAMPLED, state),
            SpanContext(trace_id, span.parent, remote, SAMPLED, state) if span.parent else None,
            self._resource,
            _within(span.attributes, limits.max_span_attributes, limits.max_span_attribute_length),
            self._events(span) if span.events else (),
            kind=SpanKind[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else UNSET,
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )

    def _events(self, span: SpanOf) -> Any:
        most, longest = self._limits.max_event_attributes, self._limits.max_attribute_length
        found = [Event(name, _within(said, most, longest), _ns(at_s)) for at_s, name, said in span.events]
        if self._limits.max_events is None or len(found) <= self._limits.max_events:
            return found
        # The last ones, with the number of the others.
        last: Any = BoundedList(self._limits.max_events)
        last.extend(found)
        return last

    def flush(self) -> None:
        """Send what there is."""
        self._processor.force_flush(int(CLOSE_WITHIN_S * 1000))

    def close(self) -> None:
        """Send what is left; a collector that is away must not hold up the end of a process."""
        ending = threading.Thread(target=self._end, name="spans", daemon=True)
        ending.start()
        ending.join(CLOSE_WITHIN_S)

    def _end(self) -> None:
        self.flush()
        self._processor.shutdown()  # type: ignore[no-untyped-call]


def _most_waiting() -> int:
    """As ``OTEL_BSP_MAX_QUEUE_SIZE`` says; the processor does not tell."""
    said = os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE, "")
    return int(said) if said.isdigit() and int(said) > 0 else MOST_WAITING


def _within(attributes: Mapping[str, Any], most: int | None, longest: int | None) -> Mapping[str, Any]:
    if longest is None and (most is None or len(attributes) <= most):
        return attributes
    return BoundedAttributes(most, dict(attributes), max_value_len=longest)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
