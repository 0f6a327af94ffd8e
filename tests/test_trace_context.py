from __future__ import annotations

import pytest

from hycluster.trace_context import TraceContext, new_span_id, new_trace_id, trace_context

SAID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_what_a_caller_says_is_read_and_said_again() -> None:
    read = trace_context({"traceparent": SAID, "tracestate": "vendor=1,other=2"})
    assert read == TraceContext(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, True, "vendor=1,other=2")
    assert read.headers == {"traceparent": SAID, "tracestate": "vendor=1,other=2"}
    unsampled = trace_context({"traceparent": SAID[:-2] + "00"})
    assert unsampled is not None
    assert not unsampled.sampled
    assert unsampled.headers == {"traceparent": SAID[:-2] + "00"}


def test_a_later_version_may_say_more() -> None:
    assert trace_context({"traceparent": "cc" + SAID[2:] + "-what-will-be"}) == trace_context({"traceparent": SAID})


@pytest.mark.parametrize(
    "said",
    [
        "",
        "nonsense",
        "ff" + SAID[2:],
        SAID + "-more",
        SAID.upper(),
        SAID[:-1],
        "00-" + "0" * 32 + SAID[35:],
        SAID[:36] + "0" * 16 + "-01",
    ],
)
def test_what_is_no_context_is_none(said: str) -> None:
    assert trace_context({"traceparent": said}) is None


def test_a_state_that_nobody_has_to_pass_on_is_left_out() -> None:
    for state in ("x=" + "y" * 600, "a\x00b", "ä=1"):
        read = trace_context({"traceparent": SAID, "tracestate": state})
        assert read is not None
        assert read.state == ""


def test_ids_differ_and_are_not_zero() -> None:
    assert len({new_trace_id() for _ in range(1000)} - {0}) == 1000
    assert len({new_span_id() for _ in range(1000)} - {0}) == 1000
