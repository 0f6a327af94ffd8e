"""A timeline as the spans of a trace, by OpenTelemetry's conventions for GenAI. Knows nothing of OpenTelemetry's SDK.

    chat MODEL                     the request, as its caller sees it        SERVER
      receive, wait, prepare       what the ingress and the gateway did      INTERNAL
      generate REPLICA             one for each replica that had it          CLIENT
        send, queue, prefill, decode, preempted                              INTERNAL
      migrate                      between two replicas                      INTERNAL
      deliver

The engine's part is made here too, from what it says of each request, and not by vLLM's own tracing: docs/tracing.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hycluster.stages import Stage, sequence_stages, stages_of
from hycluster.timeline import Event, Timeline, Track
from hycluster.trace_context import new_span_id

# By what the caller asked for; of the conventions' well-known values.
OPERATIONS = {
    "POST /v1/chat/completions": "chat",
    "POST /v1/responses": "chat",
    "POST /v1/messages": "chat",
    "POST /v1/completions": "text_completion",
    "POST /v1/embeddings": "embeddings",
}
DEFAULT_OPERATION = "generate_content"
PROVIDER = "hycluster"


class SpanOf(NamedTuple):
    """One span. Times are seconds since 1970; ``parent`` is a span's id, 0 for none.

    Attributes:
        kind: of OpenTelemetry's kinds, in upper case.
        error: why it failed; empty if it did not.
    """

    name: str
    kind: str
    start_s: float
    end_s: float
    span_id: int
    parent: int
    attributes: Mapping[str, Any]
    events: tuple[Event, ...] = ()
    error: str = ""


def operation_of(timeline: Timeline) -> str:
    """What was asked for, as the conventions call it."""
    if "gen_ai.operation.name" in timeline.attributes:
        return str(timeline.attributes["gen_ai.operation.name"])
    return OPERATIONS.get(timeline.operation, "chat" if timeline.operation == "row" else DEFAULT_OPERATION)


def spans_of(timeline: Timeline) -> list[SpanOf]:
    """All spans of a request that has ended, each after its parent."""
    since = timeline.started - timeline.began_s
    found = [_root(timeline, since)]
    found += (
        _of_stage(stage, timeline.started, timeline.span_id)
        for stage in stages_of(timeline)
        # What is on the way to an engine or in it is told by sequence.
        if stage.process != "engine" and stage.name not in ("send", "migrate")
    )
    for track in timeline.tracks:
        found += _of_track(track, timeline, since)
    return found


def _root(timeline: Timeline, since: float) -> SpanOf:
    operation = operation_of(timeline)
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": timeline.model,
        "gen_ai.response.model": timeline.model,
        "gen_ai.response.id": timeline.tracks[0].name if timeline.tracks else timeline.id,
        "gen_ai.usage.input_tokens": timeline.prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.output_tokens,
        "hycluster.request.id": timeline.id,
        "hycluster.process": timeline.process,
        **timeline.attributes,
    }
    if cached := max((track.cached_tokens for track in timeline.tracks), default=0):
        attributes["gen_ai.usage.cache_read.input_tokens"] = cached
    if reasons := [event.attributes["reason"] for track in timeline.tracks if (event := _end_of(track))]:
        attributes["gen_ai.response.finish_reasons"] = reasons
    if (ttft_s := timeline.ttft_s) is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = ttft_s
    if timeline.operation.startswith("grpc "):
        attributes |= {"rpc.system.name": "grpc", "rpc.method": f"hycluster.v1.Inference/{timeline.operation[5:]}"}
    elif " " in timeline.operation:
        method, _, path = timeline.operation.partition(" ")
        attributes |= {"http.request.method": method, "url.path": path, "http.route": path}
    error = (timeline.error or timeline.status) if timeline.status != "ok" else ""
    if error:
        attributes["error.type"] = timeline.error.partition(":")[0] or timeline.status
    return SpanOf(
        f"{operation} {timeline.model}".strip(),
        # Nobody has called for a row.
        "INTERNAL" if timeline.operation == "row" else "SERVER",
        timeline.started,
        timeline.started + timeline.duration_s,
        timeline.span_id,
        timeline.parent.span_id if timeline.parent else 0,
        attributes,
        tuple(Event(event.at_s + since, event.name, _flat(event.attributes)) for event in timeline.events),
        error,
    )


def _end_of(track: Track) -> Event | None:
    return track.events[-1] if track.events and track.events[-1].name == "finished" else None


def _of_stage(stage: Stage, started: float, parent: int) -> SpanOf:
    said = {f"hycluster.{name}": value for name, value in _flat(stage.attributes).items()}
    start_s = started + stage.start_s
    # Whoever was called has been told it already.
    called = said.pop("hycluster.span_id", None)
    kind, span_id = ("CLIENT", int(called, 16)) if called else ("INTERNAL", new_span_id())
    return SpanOf(stage.name, kind, start_s, start_s + stage.duration_s, span_id, parent, said)


def _of_track(track: Track, timeline: Timeline, since: float) -> Iterator[SpanOf]:
    """For each replica that had the sequence a span with its stages there; what lay between them beside it."""
    end_s = track.ended_s or timeline.began_s + timeline.duration_s
    leg: list[Stage] = []
    for stage in sequence_stages(track, timeline.began_s, end_s):
        if leg and stage.name in ("send", "migrate"):
            yield from _leg(leg, track, timeline, since)
            leg = []
        if stage.name == "migrate":
            yield _of_stage(stage, timeline.started, timeline.span_id)
        elif stage.name == "send" or leg:
            leg.append(stage)
    if leg:
        yield from _leg(leg, track, timeline, since)


def _leg(leg: list[Stage], track: Track, timeline: Timeline, since: float) -> Iterator[SpanOf]:
    span_id, replica = new_span_id(), str(leg[0].attributes.get("replica", ""))
    began_s = timeline.began_s + leg[0].start_s
    ended_s = timeline.began_s + max(stage.end_s for stage in leg)
    lost = next((event for event in track.events if event.name == "lost" and event.at_s == ended_s), None)
    attributes = {
        "gen_ai.operation.name": operation_of(timeline),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": timeline.model,
        "hycluster.replica": replica,
        "hycluster.sequence": track.name,
    }
    yield SpanOf(
        f"generate {replica}",
        "CLIENT",
        timeline.started + leg[0].start_s,
        since + ended_s,
        span_id,
        timeline.span_id,
        attributes,
        tuple(
            Event(event.at_s + since, event.name, _flat(event.attributes))
            for event in track.events
            if began_s <= event.at_s <= ended_s
        ),
        f"replica {lost.attributes['reason']}" if lost else "",
    )
    for stage in leg:
        yield _of_stage(stage, timeline.started, span_id)


def _flat(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """OpenTelemetry's attributes are plain values, or lists of them."""
    flat: dict[str, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
