"""A request's timeline: what happened to it and when, in the process that carries it out.

There is one for each request. ``hycluster why`` and the spans of a trace are both made from it, once it has ended
(``stages.py`` beside it), so that they can't say different things; while the request is on its way, an event costs the
append of a tuple, and a token costs nothing.

All times are of this process's monotonic clock. What an engine says by its own clock is aligned as it arrives: its
message was sent before it came, so the least difference of the two clocks that any message of its has shown is the
closest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from hycluster.trace_context import TraceContext, new_span_id, new_trace_id

# One sequence's, which may be preempted time and again, and one request's.
MOST_EVENTS = 200
# Sequences of one request that are told of; a request may have thousands of prompts.
MOST_TRACKS = 16
# Candidates of the router that are told of.
MOST_CANDIDATES = 8

# vLLM's ``EngineCoreEventType``; ``tests/engine/test_messages.py`` compares.
ENGINE_EVENTS = {1: "queued", 2: "scheduled", 3: "preempted"}

# What our scheduler tells of a bulk row, in the headers that vLLM gives back with each output.
PARKED_S, GIVEN_UP = "hycluster-parked-s", "hycluster-given-up"

# How sequences end whose answers are whole, or whose caller has left: then the front end stops it, as at a stop string.
WHOLE = frozenset({"stop", "length", "repetition", "abort", "stopped"})

current: ContextVar[Timeline | None] = ContextVar("hycluster_timeline", default=None)


class Event(NamedTuple):
    """What happened, and when on this process's monotonic clock."""

    at_s: float
    name: str
    attributes: Mapping[str, Any]


class EngineEvent(Protocol):
    """As an engine says it: ``type`` is one of ``ENGINE_EVENTS``, ``timestamp`` of its own monotonic clock."""

    @property
    def type(self) -> int: ...

    @property
    def timestamp(self) -> float: ...


class Track:
    """One sequence's way through the engines. Most requests have one, with ``n`` > 1 or several prompts there are more.

    Attributes:
        name: what engines know it by.
        replica: where it is, or was last.
        cached_tokens: of the prompt, what the KV cache had.
        tokens_so_far: asked for the output that it has, until it has ended.
        parked_s: how long its engine left it out of steps for online requests.
        given_up: how often its slot or blocks went to them.
        ended_s: when its last token came; None before.
    """

    __slots__ = (
        "_first", "_offset_s", "_output_tokens", "cached_tokens", "ended_s", "events", "given_up", "name", "parked_s",
        "replica", "sent_s", "tokens_so_far",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: list[Event] = []
        self.replica = ""
        self.sent_s = time.monotonic()
        self.tokens_so_far: Callable[[], int] | None = None
        self._output_tokens = 0
        self.cached_tokens = 0
        self.parked_s = 0.0
        self.given_up = 0
        self.ended_s: float | None = None
        self._offset_s = math.inf
        self._first = True

    @property
    def output_tokens(self) -> int:
        """Of the output that it has."""
        return self._output_tokens if self.tokens_so_far is None else self.tokens_so_far()

    @output_tokens.setter
    def output_tokens(self, tokens: int) -> None:
        self.tokens_so_far = None
        self._output_tokens = tokens

    def note(self, name: str, at_s: float | None = None, **attributes: Any) -> None:
        """Something has happened, now or at a time of this process's clock."""
        if len(self.events) < MOST_EVENTS:
            self.events.append(Event(time.monotonic() if at_s is None else at_s, name, attributes))

    def routed(self, replica: str, scores: Iterable[tuple[str, int]], tokens_kept: int, adapter: str | None) -> None:
        """It is sent to a replica, which was chosen by these: of each candidate, the tokens outstanding there."""
        now = time.monotonic()
        candidates = {name: tokens for _, (name, tokens) in zip(range(MOST_CANDIDATES), scores, strict=False)}
        self.note("routed", now, replica=replica, candidates=candidates)
        if self.replica:
            self.note("migrated", now, to=replica, tokens_kept=tokens_kept, **{"from": self.replica})
        sent: dict[str, Any] = {"replica": replica} | ({"adapter": adapter} if adapter else {})
        self.note("sent", now, **sent)
        self.replica, self.sent_s = replica, now
        self._offset_s, self._first = math.inf, True

    def heard(self, engine_s: float, now_s: float, events: Iterable[EngineEvent] | None) -> None:
        """Its engine has said something of it: the first token there, or what has events.

        Args:
            engine_s: when the engine said so, by its own clock.
            now_s: when that came here.
        """
        self._offset_s = min(self._offset_s, now_s - engine_s)
        again = False
        for event in events or ():
            # Not before it was sent, nor after it was heard of, whatever the engine's clock did.
            at_s = min(max(event.timestamp + self._offset_s, self.sent_s), now_s)
            name = ENGINE_EVENTS.get(event.type, "unknown")
            self.note(name, at_s, replica=self.replica)
            again |= name == "preempted"
        if self._first:
            self._first = False
            self.note("first_token", now_s, replica=self.replica)
        elif again:
            self.note("resumed", now_s, replica=self.replica)

    def aside(self, headers: Mapping[str, str]) -> None:
        """What our scheduler has told with an output."""
        if PARKED_S in headers:
            self.parked_s = max(self.parked_s, float(headers[PARKED_S]))
            self.given_up = max(self.given_up, int(headers.get(GIVEN_UP, "0")))

    def lost(self, heard_s: float, reason: str) -> None:
        """Its replica is gone, of which the last word came at ``heard_s``."""
        self.note("lost", max(heard_s, self.sent_s), replica=self.replica, reason=reason)

    def end(self, reason: str) -> None:
        """No more tokens will come."""
        # Nothing is held on to that has the request in it.
        self.output_tokens = self.output_tokens
        self.ended_s = time.monotonic()
        asides: dict[str, Any] = {"parked_s": round(self.parked_s, 6)} if self.parked_s else {}
        if self.given_up:
            asides["given_up"] = self.given_up
        # The last one of a full list: how it ended matters more than one more preemption.
        del self.events[MOST_EVENTS - 1 :]
        self.note("finished", self.ended_s, replica=self.replica, reason=reason, tokens=self.output_tokens, **asides)


class Timeline:
    """One request, from its arrival in this process until its caller has its answer.

    Args:
        request_id: what its caller is told, or has said; empty: as its first sequence is called.
        process: what carries it out: ``ingress`` or ``batch``.
        operation: how it came: ``POST /v1/chat/completions``, ``grpc Generate``, ``row``.
        parent: whose span it is a part of.
        sampled: its spans are to be exported.

    Attributes:
        status: ``ok``, ``failed`` or ``cancelled``; empty until it has ended.
        error: why it failed; what is set before the end makes it one that failed.
        cancelled: its caller has left.
        bulk: it is batch work, whose caller does not wait for it.
        attributes: what else its span says.
    """

    __slots__ = (
        "_limit", "_named", "attributes", "began_s", "bulk", "cancelled", "ended_s", "error", "events", "id", "model",
        "operation", "parent", "process", "prompt_tokens", "sampled", "span_id", "started", "status", "trace_id",
        "tracks",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        process: str,
        operation: str,
        parent: TraceContext | None = None,
        *,
        sampled: bool = False,
        model: str = "",
    ) -> None:
        self.began_s = time.monotonic()
        self.started = time.time()
        self.id = request_id
        self.process = process
        self.operation = operation
        self.model = model
        self.parent = parent
        self.sampled = sampled
        self.trace_id = parent.trace_id if parent else new_trace_id()
        self.span_id = new_span_id()
        self.events = [Event(self.began_s, "received", {})]
        self.tracks: list[Track] = []
        self.prompt_tokens = 0
        self.status = ""
        self.error = ""
        self.cancelled = False
        self.bulk = operation == "row"
        self.ended_s: float | None = None
        self.attributes: dict[str, Any] = {}
        self._limit = 2 * MOST_TRACKS
        self._named = ""

    def note(self, name: str, **attributes: Any) -> None:
        """Something has happened, now."""
        if len(self.events) < MOST_EVENTS:
            self.events.append(Event(time.monotonic(), name, attributes))

    def admitted(self) -> None:
        """It is within its gateway's bounds. Said once: with several sequences each is asked about."""
        if not self.tracks and all(event.name != "admitted" for event in self.events):
            self.note("admitted")

    def call(self) -> TraceContext:
        """It is asked of another process, under this span."""
        span_id = new_span_id()
        self.note("called", span_id=f"{span_id:016x}")
        return replace(self.context, span_id=span_id)

    def begin_track(self, name: str, model: str, prompt_tokens: int, *, bulk: bool = False) -> Track:
        """One of its sequences goes to the engines."""
        self.bulk |= bulk
        self.model, self.id = self.model or model, self.id or name
        # Sequences of one prompt have its name, and come one after the other.
        self.prompt_tokens += prompt_tokens if name != self._named else 0
        self._named = name
        if len(self.tracks) >= self._limit:
            self._thin_out()
        track = Track(name)
        self.tracks.append(track)
        return track

    def _thin_out(self) -> None:
        """Forget sequences that ended early: what took long is told by those that end last."""
        ended = sorted((track for track in self.tracks if track.ended_s is not None), key=lambda t: t.ended_s or 0.0)
        forgotten = {id(track) for track in ended[: max(0, len(self.tracks) - MOST_TRACKS)]}
        self.tracks = [track for track in self.tracks if id(track) not in forgotten]
        # Those that are in work are kept, however many, and not looked through each time.
        self._limit = max(2 * MOST_TRACKS, 2 * len(self.tracks))

    def end(self, status: str, error: str = "") -> None:
        """Its caller has its answer, or has left."""
        if self.ended_s is None:
            self.ended_s = time.monotonic()
            self.events.append(Event(self.ended_s, "delivered" if status == "ok" else status, {}))
            self.status, self.error = status, error
            for track in self.tracks:
                # One that no replica took has not ended: what is kept must not keep its prompt.
                track.output_tokens = track.output_tokens
            self._limit = MOST_TRACKS
            if len(self.tracks) > MOST_TRACKS:
                self._thin_out()

    @property
    def broken(self) -> str:
        """What a sequence of its ended with that is no end of an answer; empty if none did. Who streams says so in the
        midst of an answer that began well."""
        ends = (track.events[-1] for track in self.tracks if track.ended_s is not None and track.events)
        reasons = (str(end.attributes.get("reason", "")) for end in ends if end.name == "finished")
        return next((reason for reason in reasons if reason not in WHOLE), "")

    @property
    def context(self) -> TraceContext:
        """Its span, to whom it calls."""
        return TraceContext(self.trace_id, self.span_id, self.sampled, self.parent.state if self.parent else "")

    @property
    def duration_s(self) -> float:
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.began_s

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token here; None if there was none."""
        firsts = (event.at_s for track in self.tracks for event in track.events if event.name == "first_token")
        first = min(firsts, default=None)
        return None if first is None else first - self.began_s

    @property
    def output_tokens(self) -> int:
        return sum(track.output_tokens for track in self.tracks)

    def known_as(self, wanted: str) -> bool:
        """Whether this is the request that somebody asks about: by its id, by the id in its answer's body
        (``chatcmpl-...``), or by the id of a job's row, before which the job's own name stands. Of the Batch API that
        is the id in the line of its output."""
        wanted = wanted.removeprefix("batch_req_")
        if wanted == self.id or self.id.endswith(f"-{wanted}"):
            return True
        return any(f"-{wanted}-" in f"-{track.name}-" for track in self.tracks)


def exemplar(timeline: Timeline | None = None) -> dict[str, str] | None:
    """The labels by which a metric points to a request's trace; by default to the one that is being carried out here.
    None if no trace is recorded."""
    timeline = timeline or current.get()
    return {"trace_id": f"{timeline.trace_id:032x}"} if timeline is not None and timeline.sampled else None
