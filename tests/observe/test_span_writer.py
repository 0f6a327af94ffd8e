"""Spans that are made whole, against those that OpenTelemetry's own tracer makes of the same."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from hycluster import __version__
from hycluster.observe import span_writer
from hycluster.observe.span_writer import SpanWriter, _ns
from hycluster.observe.spans import SpanOf, spans_of
from hycluster.observe.traces import span_metrics
from hycluster.timeline import Timeline
from hycluster.trace_context import TraceContext
from tests.timelines import begun, ended, migrated, usual
from tests.waiting import PATIENCE_S, eventually

LIMITS = {
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "3", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "4",
    "OTEL_SPAN_EVENT_COUNT_LIMIT": "2", "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": "1",
}  # fmt: skip


class Ids(IdGenerator):
    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


def within_their_parents(spans: list[SpanOf]) -> Iterator[SpanOf]:
    """As they are written, whichever way their floats were rounded."""
    times = {0: (0.0, math.inf)}
    for span in spans:
        start_s, end_s = times.get(span.parent, times[0])
        times[span.span_id] = max(start_s, span.start_s), min(end_s, span.end_s)
        yield span._replace(start_s=times[span.span_id][0], end_s=times[span.span_id][1])


def by_a_tracer(spans: list[SpanOf], timeline: Timeline) -> tuple[ReadableSpan, ...]:
    ids, exporter = Ids(), InMemorySpanExporter()
    described = Resource({"service.name": "hycluster-ingress", "service.version": __version__})
    provider = TracerProvider(resource=described, id_generator=ids, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("hycluster", __version__)
    state, ids.trace_id = timeline.context.state, timeline.trace_id
    for span in spans:
        context, ids.span_id = Context(), span.span_id
        if span.parent:
            of = SpanContext(
                timeline.trace_id,
                span.parent,
                span.kind == "SERVER",
                TraceFlags(TraceFlags.SAMPLED),
                TraceState.from_header([state] if state else []),
            )
            context = set_span_in_context(NonRecordingSpan(of), context)
        made = tracer.start_span(
            span.name, context, SpanKind[span.kind], dict(span.attributes), start_time=_ns(span.start_s)
        )
        for event in span.events:
            made.add_event(event.name, dict(event.attributes), _ns(event.at_s))
        if span.error:
            made.set_status(StatusCode.ERROR, span.error)
        made.end(_ns(span.end_s))
    provider.shutdown()
    return exporter.get_finished_spans()


@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["default", "limits"])
@pytest.mark.parametrize("kind", ["usual", "migrated", "failed", "of a trace"])
def test_they_are_the_same(kind: str, limits: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    timeline = {  # type: ignore[no-untyped-call]
        "usual": usual,
        "migrated": migrated,
        "failed": lambda: ended(begun(), 1.0, "failed", "EngineFailed: gone"),
        "of a trace": lambda: ended(begun(parent=TraceContext(5, 6, True, "vendor=1,other=2")), 1.0),
    }[kind]()
    spans = list(within_their_parents(spans_of(timeline)))
    assert spans
    # Ids are drawn when spans are made of a timeline.
    monkeypatch.setattr(span_writer, "spans_of", lambda _: spans)
    exporter = InMemorySpanExporter()
    writer = SpanWriter(exporter, "ingress")
    writer.write(timeline)
    writer.close()
    made, wanted = exporter.get_finished_spans(), by_a_tracer(spans, timeline)
    assert len(made) == len(spans)
    assert encode_spans(made) == encode_spans(wanted)
    if limits:
        assert any(span.dropped_attributes for span in made)


def test_what_ends_with_its_parent_does_not_end_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another sum than its parent's, and so far from 1970 floats are a quarter of 1e-6 apart."""
    started, end = 1_764_518_400.123456, 1_764_518_400.123456 + 0.3
    later = math.nextafter(end, math.inf)
    spans = [
        SpanOf("parent", "SERVER", started, end, 1, 0, {}),
        SpanOf("child", "INTERNAL", math.nextafter(started, 0), later, 2, 1, {}),
        SpanOf("grandchild", "INTERNAL", started + 0.1, later, 3, 2, {}),
    ]
    monkeypatch.setattr(span_writer, "spans_of", lambda _: spans)
    exporter = InMemorySpanExporter()
    writer = SpanWriter(exporter, "ingress")
    writer.write(usual())
    writer.close()
    parent, child, grandchild = exporter.get_finished_spans()
    assert (child.start_time, child.end_time, grandchild.end_time) == (
        parent.start_time,
        parent.end_time,
        parent.end_time,
    )


class _Away(SpanExporter):
    """A collector that does not answer until ``back``, and then takes nothing."""

    def __init__(self) -> None:
        self.back = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        assert self.back.wait(PATIENCE_S)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Nothing is held."""


def test_what_no_collector_has_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTEL_BSP_MAX_QUEUE_SIZE, "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    exporter = _Away()
    writer = SpanWriter(exporter, "ingress")
    spans = len(spans_of(usual()))
    writer.write(usual())
    eventually(lambda: writer._exporter.given == 1)
    while writer._written < 100:
        writer.write(usual())
    # One is on its way, eight wait.
    assert writer.lost == writer._written - 9
    exporter.back.set()
    writer.close()
    assert writer.lost == writer._written
    assert writer._written % spans == 0


def test_what_arrives_is_not_lost() -> None:
    exporter = InMemorySpanExporter()
    writer = SpanWriter(exporter, "ingress")
    for _ in range(50):
        writer.write(usual())
    writer.close()
    assert (writer.lost, len(exporter.get_finished_spans())) == (0, writer._written)
    span_metrics.watch("spans", writer)
    (family,) = span_metrics.collect()
    assert [sample.value for sample in family.samples] == [0]
