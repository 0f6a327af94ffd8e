"""Which trace a request belongs to: W3C Trace Context, read from its caller and told to engines; and its id."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote_from_bytes

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# Of a later version more may follow; version ff, and ids of nothing but zeros, are not allowed.
_WRITTEN = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# What is longer nobody has to pass on.
_MOST_STATE = 512
_SAMPLED = 1
_PRINTABLE = bytes(range(ord(" "), ord("~") + 1))


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span, as one process names it to another.

    Attributes:
        sampled: whoever began the trace records it.
        state: what vendors add, as it came.
    """

    trace_id: int
    span_id: int
    sampled: bool
    state: str = ""

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.sampled):02x}"

    @property
    def headers(self) -> dict[str, str]:
        """As it travels on."""
        return {TRACEPARENT: self.traceparent} | ({TRACESTATE: self.state} if self.state else {})


def trace_context(headers: Mapping[str, str]) -> TraceContext | None:
    """What a caller says, by headers or metadata with names in lower case; None if it says nothing that can be read."""
    found = _WRITTEN.fullmatch(headers.get(TRACEPARENT, "").strip())
    if found is None or (found[0].startswith("00-") and found[4]):
        return None
    state = headers.get(TRACESTATE, "").strip()
    kept = state if len(state) <= _MOST_STATE and state.isascii() and state.isprintable() else ""
    return TraceContext(int(found[1], 16), int(found[2], 16), bool(int(found[3], 16) & _SAMPLED), kept)


def written_id(said: str | bytes) -> str:
    """A request's id as all views have it: what is not ASCII to be printed is percent-encoded, as in a URL.

    Callers write what they like, and by HTTP in whatever encoding. An id must not fail a call, goes into headers,
    metadata, logs and terminals, and has to be found by what was written.
    """
    raw = said if isinstance(said, bytes) else said.encode("utf-8", "replace")
    return quote_from_bytes(raw, _PRINTABLE)


def new_trace_id() -> int:
    # As OpenTelemetry's SDK draws them: they have to differ, not to be secret.
    return random.getrandbits(128) or 1


def new_span_id() -> int:
    return random.getrandbits(64) or 1
