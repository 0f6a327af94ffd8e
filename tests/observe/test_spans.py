from __future__ import annotations

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from hycluster.observe.spans import SpanOf, operation_of, spans_of
from hycluster.timeline import Timeline
from hycluster.trace_context import TraceContext
from tests.timelines import begun, ended, migrated, usual


def tree(timeline: Timeline) -> dict[str, list[str]]:
    """By a span's name, those of its children."""
    found = spans_of(timeline)
    names = {span.span_id: span.name for span in found}
    assert len(names) == len(found), "ids must differ"
    children: dict[str, list[str]] = {}
    for span in found:
        children.setdefault(names.get(span.parent, ""), []).append(span.name)
    return children


def whole(found: list[SpanOf]) -> None:
    """Each span after its parent, and within it."""
    known: dict[int, SpanOf] = {}
    for span in found:
        if (parent := known.get(span.parent)) is not None:
            assert parent.start_s - 1e-6 <= span.start_s <= span.end_s <= parent.end_s + 1e-6, span.name
        else:
            assert span is found[0]
        known[span.span_id] = span


def test_the_usual_request_is_one_tree() -> None:
    timeline = usual()
    whole(spans_of(timeline))
    assert tree(timeline) == {
        "": ["chat tiny"],
        "chat tiny": ["receive", "prepare", "deliver", "generate r0"],
        "generate r0": ["send", "queue", "prefill", "decode"],
    }


def test_a_migrated_one_has_a_span_for_each_replica_and_one_between() -> None:
    timeline = migrated()
    found = spans_of(timeline)
    whole(found)
    assert tree(timeline)["chat tiny"] == ["receive", "prepare", "generate r0", "migrate", "generate r1"]
    first, second = (span for span in found if span.name.startswith("generate"))
    assert (first.error, second.error) == ("replica died", "")
    assert [event.name for event in first.events][-1] == "lost"
    moved = next(event for event in second.events if event.name == "migrated")
    assert moved.attributes == {"from": "r0", "to": "r1", "tokens_kept": 3}
    routed = next(event for event in second.events if event.name == "routed")
    assert routed.attributes["candidates.r1"] == 7


def test_it_says_what_the_conventions_name() -> None:
    root = spans_of(usual())[0]
    known = {value for name, value in vars(gen_ai_attributes).items() if name.isupper() and isinstance(value, str)}
    for span in spans_of(usual()):
        assert {name for name in span.attributes if name.startswith("gen_ai.")} <= known
    assert root.kind == "SERVER"
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "chatcmpl-r",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": pytest.approx(1.0),
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
    }.items() <= root.attributes.items()
    assert [event.name for event in root.events] == ["received", "admitted", "delivered"]


def test_it_is_a_part_of_its_callers_trace() -> None:
    assert spans_of(ended(begun(parent=TraceContext(5, 6, True)), 1.0))[0].parent == 6
    assert spans_of(ended(begun(), 1.0))[0].parent == 0


@pytest.mark.parametrize(
    ("status", "error", "said", "kind"),
    [
        ("ok", "", "", None),
        ("failed", "Overloaded: too much", "Overloaded: too much", "Overloaded"),
        ("cancelled", "", "cancelled", "cancelled"),
    ],
)
def test_how_it_ended(status: str, error: str, said: str, kind: str | None) -> None:
    root = spans_of(ended(begun(), 1.0, status, error))[0]
    assert (root.error, root.attributes.get("error.type")) == (said, kind)


def test_what_was_asked_for() -> None:
    for operation, name in (
        ("POST /v1/chat/completions", "chat"),
        ("POST /v1/completions", "text_completion"),
        ("POST /v1/embeddings", "embeddings"),
        ("row", "chat"),
        ("grpc Generate", "generate_content"),
    ):
        assert operation_of(Timeline("r", "ingress", operation)) == name
    called = ended(Timeline("r", "ingress", "grpc GenerateStream", model="tiny"), 1.0)
    assert spans_of(called)[0].attributes["rpc.method"] == "hycluster.v1.Inference/GenerateStream"
