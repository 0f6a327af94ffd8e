"""Timelines as requests leave them, with times that are said: for tests of what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

from hycluster.timeline import Event, Timeline, Track

BEGAN_S = 1000.0
# An engine's clock, which began at another time.
ENGINE_S = 7.0


@dataclass
class Said:
    """An engine's event."""

    type: int
    timestamp: float


QUEUED, SCHEDULED, PREEMPTED = 1, 2, 3


def begun(request_id: str = "r", **named: object) -> Timeline:
    """A request that has come."""
    timeline = Timeline(request_id, "ingress", "POST /v1/chat/completions", model="tiny", **named)  # type: ignore[arg-type]
    timeline.began_s, timeline.started = BEGAN_S, 1_800_000_000.0
    timeline.events = [Event(BEGAN_S, "received", {})]
    return timeline


def noted(timeline: Timeline, at_s: float, name: str, **attributes: object) -> None:
    timeline.events.append(Event(BEGAN_S + at_s, name, attributes))


def sent(timeline: Timeline, at_s: float, replica: str = "r0", name: str = "chatcmpl-r") -> Track:
    """One of its sequences, on its way to a replica."""
    track = timeline.begin_track(name, "tiny", 10)
    goes(track, at_s, replica)
    return track


def goes(track: Track, at_s: float, replica: str) -> None:
    """To a replica, the first one or the next."""
    before = len(track.events)
    track.routed(replica, [("r0", 5), ("r1", 7)], track.output_tokens, None)
    track.sent_s = BEGAN_S + at_s
    track.events[before:] = [event._replace(at_s=BEGAN_S + at_s) for event in track.events[before:]]


def heard(track: Track, at_s: float, *events: tuple[int, float], said_at_s: float | None = None) -> None:
    """Its engine says something that happened at these times; it comes a moment after it was said."""
    said = [Said(kind, ENGINE_S + when) for kind, when in events]
    track.heard(ENGINE_S + (at_s if said_at_s is None else said_at_s), BEGAN_S + at_s, said)


def finished(track: Track, at_s: float, tokens: int = 8, reason: str = "stop") -> None:
    track.output_tokens = tokens
    track.end(reason)
    track.ended_s = BEGAN_S + at_s
    track.events[-1] = track.events[-1]._replace(at_s=BEGAN_S + at_s)


def ended(timeline: Timeline, at_s: float, status: str = "ok", error: str = "") -> Timeline:
    timeline.end(status, error)
    timeline.ended_s = BEGAN_S + at_s
    timeline.events[-1] = timeline.events[-1]._replace(at_s=BEGAN_S + at_s)
    return timeline


def usual() -> Timeline:
    """A request that nothing befell."""
    timeline = begun()
    noted(timeline, 0.1, "admitted")
    track = sent(timeline, 0.3)
    heard(track, 1.0, (QUEUED, 0.4), (SCHEDULED, 0.6), said_at_s=0.9)
    finished(track, 2.0)
    return ended(timeline, 2.2)


def migrated() -> Timeline:
    """One whose replica died after some tokens."""
    timeline = begun()
    noted(timeline, 0.1, "admitted")
    track = sent(timeline, 0.2)
    heard(track, 1.0, (QUEUED, 0.3), (SCHEDULED, 0.4))
    track.output_tokens = 3
    track.lost(BEGAN_S + 1.5, "died")
    goes(track, 2.0, "r1")
    heard(track, 2.6, (QUEUED, 2.1), (SCHEDULED, 2.2))
    finished(track, 3.0)
    return ended(timeline, 3.0)
