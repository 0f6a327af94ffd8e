"""Where a request's time went: its timeline cut into stages, one after the other, without a gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from hycluster.timeline import Event, Timeline, Track

# By the event that begins it: the stage, and where it passes. Of the gateway's own clock but for what engines do.
AFTER = {
    "received": ("receive", "ingress"),
    "waiting": ("wait", "gateway"),
    "admitted": ("prepare", "ingress"),
    # Of a job's row: by another process, which has a timeline of its own.
    "called": ("call", "ingress"),
    # Both ways: clocks of two machines can't tell them apart. An adapter that the engine loads first counts here.
    "sent": ("send", "gateway"),
    "queued": ("queue", "engine"),
    "scheduled": ("prefill", "engine"),
    "first_token": ("decode", "engine"),
    "preempted": ("preempted", "engine"),
    "resumed": ("decode", "engine"),
    "lost": ("migrate", "gateway"),
    "finished": ("deliver", "ingress"),
    # The end of one sequence, after which its request asked for another.
    "went_on": ("prepare", "ingress"),
}
PARKED = "parked"

# Of a request that no process knows.
KEPT = "each keeps its last ones only, and none that was refused before an engine was asked"
# What each of them is, for people.
MEANINGS = {
    "receive": "read, checked and given to its model",
    "wait": "waited for a place, or for a replica to start",
    "call": "asked of an ingress process",
    "prepare": "admitted; its template rendered, its prompt tokenized",
    "send": "to the engine and back, and an adapter's loading",
    "queue": "waited in the engine for its turn",
    "prefill": "its prompt computed",
    "decode": "its output computed, token by token",
    "preempted": "its place in the engine went to others",
    PARKED: "left out of steps for online requests",
    "migrate": "its replica was lost; until another one had it",
    "deliver": "its caller read the last of it",
}


class Stage(NamedTuple):
    """A part of a request's time. ``start_s`` is from the request's arrival on."""

    name: str
    process: str
    start_s: float
    duration_s: float
    attributes: Mapping[str, Any] = MappingProxyType({})

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s


def stages_of(timeline: Timeline) -> list[Stage]:
    """The request's whole time, from its arrival to its end, each moment in one stage.

    Of sequences that ran at the same time it is told which one the answer waited for: the one that ended last, and
    before its beginning the one that ended last until then.
    """
    end_s = timeline.ended_s if timeline.ended_s is not None else timeline.began_s + timeline.duration_s
    events: list[Event] = []
    until_s = end_s
    for track in _longest_way(timeline.tracks, end_s):
        own = list(track.events)
        if until_s < end_s and own[-1].name == "finished":
            own[-1] = own[-1]._replace(name="went_on")
        events += (event for event in own if event.at_s <= until_s)
        until_s = own[0].at_s
    taken = [(track.events[0].at_s, track.ended_s or end_s) for track in timeline.tracks if track.events]
    events += (
        event
        for event in timeline.events
        # What the request itself notes beside a sequence is of another one, that comes or goes.
        if not any(began < event.at_s < ended for began, ended in taken)
    )
    # Python's sort keeps the order of what happened at one time, in which it was noted.
    events.sort(key=lambda event: event.at_s)
    return _parked_apart(list(_cut(events, timeline.began_s, end_s)), timeline.tracks)


def sequence_stages(track: Track, began_s: float, end_s: float) -> list[Stage]:
    """One sequence's own, from its first event to its last; times are from ``began_s`` on."""
    if not track.events:
        return []
    first_s = track.events[0].at_s
    cut = _cut(track.events, first_s, end_s, before=None)
    shifted = [stage._replace(start_s=stage.start_s + first_s - began_s) for stage in cut]
    return _parked_apart([stage for stage in shifted if stage.name != "deliver"], [track])


def _longest_way(tracks: Iterable[Track], end_s: float) -> Iterable[Track]:
    """Sequences one after the other, the last one first."""
    left = sorted((track for track in tracks if track.events), key=lambda track: track.ended_s or end_s)
    until_s = end_s
    while left:
        track = left.pop()
        if track.events[0].at_s < until_s and (track.ended_s or end_s) <= until_s:
            yield track
            until_s = track.events[0].at_s


def _cut(events: Iterable[Event], began_s: float, end_s: float, before: str | None = "received") -> Iterable[Stage]:
    """Args: before: what is taken to have happened before all of them; None: nothing, and there is no such stage."""
    name, process = AFTER[before] if before else ("", "")
    at_s, attributes = began_s, dict[str, Any]()
    for event in events:
        if event.name not in AFTER:
            continue
        # Events of an engine are noted when they are heard of, with the time at which they were.
        now_s = min(max(event.at_s, at_s), end_s)
        if now_s > at_s and name:
            yield Stage(name, process, at_s - began_s, now_s - at_s, attributes)
        (name, process), at_s = AFTER[event.name], now_s
        attributes = {} if event.name in ("finished", "went_on") else dict(event.attributes)
    if end_s > at_s and name:
        yield Stage(name, process, at_s - began_s, end_s - at_s, attributes)


def _parked_apart(found: list[Stage], tracks: Iterable[Track]) -> list[Stage]:
    """What an engine left a row out of steps for is a part of the time in which it ran there."""
    left_s = max((track.parked_s for track in tracks), default=0.0)
    for name in ("decode", "prefill"):
        for place in reversed(range(len(found))):
            stage = found[place]
            parked_s = min(left_s, stage.duration_s)
            if stage.name == name and parked_s:
                left_s -= parked_s
                # Steps with it and without it took turns; as if all those without it had come first.
                rest_s = stage.duration_s - parked_s
                rest = [stage._replace(start_s=stage.start_s + parked_s, duration_s=rest_s)] if rest_s else []
                found[place : place + 1] = [Stage(PARKED, "engine", stage.start_s, parked_s, stage.attributes), *rest]
    return found


def timeline_json(timeline: Timeline) -> dict[str, Any]:
    """The timeline as JSON."""
    events = [*timeline.events, *(_of_track(track, event) for track in timeline.tracks for event in track.events)]
    return {
        **summed_up(timeline),
        "process": timeline.process,
        "operation": timeline.operation,
        "error": timeline.error,
        "trace_id": f"{timeline.trace_id:032x}" if timeline.sampled else None,
        "prompt_tokens": timeline.prompt_tokens,
        "cached_tokens": max((track.cached_tokens for track in timeline.tracks), default=0),
        "output_tokens": timeline.output_tokens,
        "spans": [
            {
                "name": stage.name,
                "process": timeline.process if stage.process == "ingress" else stage.process,
                "start_s": round(stage.start_s, 6),
                "duration_s": round(stage.duration_s, 6),
                "attributes": dict(stage.attributes),
            }
            for stage in stages_of(timeline)
        ],
        "events": [
            {
                "name": event.name,
                "at_s": round(event.at_s - timeline.began_s, 6),
                "attributes": dict(event.attributes),
            }
            for event in sorted(events, key=lambda event: event.at_s)
        ],
    }


def _of_track(track: Track, event: Event) -> Event:
    return event._replace(attributes={"sequence": track.name, **event.attributes})


def summed_up(timeline: Timeline) -> dict[str, Any]:
    """What a list of requests says of one."""
    longest = max(stages_of(timeline), key=lambda stage: stage.duration_s, default=None)
    return {
        "id": timeline.id,
        "model": timeline.model,
        "priority": "batch" if timeline.bulk else "online",
        "status": timeline.status or "running",
        "started": datetime.fromtimestamp(timeline.started, UTC).isoformat(timespec="milliseconds"),
        "duration_s": round(timeline.duration_s, 6),
        "ttft_s": None if (ttft_s := timeline.ttft_s) is None else round(ttft_s, 6),
        "slowest_stage": longest.name if longest else None,
    }
