from __future__ import annotations

import pytest

from hycluster.timeline import GIVEN_UP, MOST_EVENTS, MOST_TRACKS, PARKED_S, Timeline, current, exemplar
from hycluster.trace_context import TraceContext
from tests.timelines import BEGAN_S, PREEMPTED, QUEUED, SCHEDULED, begun, ended, finished, heard, sent


def at(timeline: Timeline, name: str) -> list[float]:
    """When something happened to its first sequence, from the request's arrival on."""
    return [round(event.at_s - BEGAN_S, 6) for event in timeline.tracks[0].events if event.name == name]


def test_an_engines_times_are_aligned_by_the_quickest_of_its_messages() -> None:
    timeline = begun()
    track = sent(timeline, 0.3)
    # The first message took 0.1 s, one behind it nothing at all.
    heard(track, 1.0, (QUEUED, 0.4), (SCHEDULED, 0.6), said_at_s=0.9)
    heard(track, 2.0, (PREEMPTED, 1.2), (SCHEDULED, 1.7))
    assert at(timeline, "queued") == [0.5]
    assert at(timeline, "scheduled") == [0.7, 1.7]
    assert at(timeline, "preempted") == [1.2]
    assert at(timeline, "first_token") == [1.0]
    assert at(timeline, "resumed") == [2.0]


def test_an_engines_clock_that_is_wrong_moves_nothing_out_of_its_place() -> None:
    timeline = begun()
    track = sent(timeline, 0.3)
    heard(track, 1.0, (QUEUED, -50.0), (SCHEDULED, 90.0))
    assert at(timeline, "queued") == [0.3]
    assert at(timeline, "scheduled") == [1.0]


def test_the_route_says_what_the_candidates_had_and_what_was_kept() -> None:
    timeline = begun()
    track = sent(timeline, 0.3)
    track.output_tokens = 4
    track.lost(BEGAN_S + 0.1, "died")
    track.routed("r1", ((f"r{number}", number) for number in range(50)), 4, "an-adapter")
    first, _, lost, second, moved, again = track.events
    assert first.attributes == {"replica": "r0", "candidates": {"r0": 5, "r1": 7}}
    # Never before it was sent there, whenever that replica last spoke.
    assert (lost.at_s, lost.attributes) == (BEGAN_S + 0.3, {"replica": "r0", "reason": "died"})
    assert len(second.attributes["candidates"]) == 8
    assert moved.attributes == {"from": "r0", "to": "r1", "tokens_kept": 4}
    assert again.attributes == {"replica": "r1", "adapter": "an-adapter"}


def test_what_is_kept_of_a_request_is_bounded() -> None:
    timeline = begun()
    for _ in range(10 * MOST_EVENTS):
        timeline.note("waiting")
    tracks = [sent(timeline, 0.1, name=f"s{number}") for number in range(10)]
    for _ in range(10 * MOST_EVENTS):
        heard(tracks[0], 1.0, (PREEMPTED, 0.5), (SCHEDULED, 0.6))
    for number, track in enumerate(tracks):
        finished(track, 1.0 + number)
    for number in range(5000):
        finished(sent(timeline, 12.0, name=f"later-{number}"), 12.0 + number / 1000)
        assert len(timeline.tracks) <= 2 * MOST_TRACKS
    ended(timeline, 60.0)
    assert len(timeline.events) <= MOST_EVENTS + 1
    assert len(timeline.tracks) == MOST_TRACKS
    # What the answer waited for is among them.
    assert timeline.tracks[-1].name == "later-4999"
    assert len(tracks[0].events) == MOST_EVENTS
    assert tracks[0].events[-1].name == "finished"


def test_each_prompt_counts_once() -> None:
    timeline = begun()
    # Two answers to each of two prompts.
    for name, tokens in (("cmpl-0", 7), ("cmpl-0", 7), ("cmpl-1", 14), ("cmpl-1", 14)):
        timeline.begin_track(name, "m", tokens)
    assert timeline.prompt_tokens == 21


def test_sequences_that_are_in_work_are_not_forgotten() -> None:
    timeline = begun()
    tracks = [sent(timeline, 0.1, name=f"s{number}") for number in range(500)]
    assert timeline.tracks == tracks


def test_what_the_scheduler_tells_aside() -> None:
    timeline = begun()
    track = sent(timeline, 0.1)
    track.aside({"traceparent": "of somebody"})
    assert (track.parked_s, track.given_up) == (0.0, 0)
    track.aside({PARKED_S: "1.500000", GIVEN_UP: "2"})
    track.aside({PARKED_S: "0.500000", GIVEN_UP: "0"})
    finished(track, 3.0, tokens=7)
    assert track.events[-1].attributes == {
        "replica": "r0", "reason": "stop", "tokens": 7, "parked_s": 1.5, "given_up": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "track", "wanted", "known"),
    [
        ("abc", "chatcmpl-abc", "abc", True),
        ("abc", "chatcmpl-abc", "chatcmpl-abc", True),
        ("abc", "cmpl-abc-0", "cmpl-abc", True),
        ("abc", "chatcmpl-abc", "ab", False),
        ("abc", "chatcmpl-abc", "", False),
        ("run1-a/b.parquet#3", "run1-a/b.parquet#3", "a/b.parquet#3", True),
        ("run1-a/b.parquet#33", "run1-a/b.parquet#33", "a/b.parquet#3", False),
        ("batch_9-lines#3", "chatcmpl-5eed", "batch_req_5eed", True),
        ("batch_9-lines#3", "chatcmpl-5eed", "5eed", True),
    ],
)
def test_by_which_names_a_request_is_found(name: str, track: str, wanted: str, known: bool) -> None:
    timeline = begun(name)
    sent(timeline, 0.1, name=track)
    assert timeline.known_as(wanted) is known


def test_a_callers_trace_goes_on_and_a_new_one_begins_where_there_is_none() -> None:
    parent = TraceContext(5, 6, True, "vendor=1")
    timeline = begun(parent=parent, sampled=True)
    assert timeline.context == TraceContext(5, timeline.span_id, True, "vendor=1")
    assert timeline.span_id != 6
    assert begun().trace_id != begun().trace_id


def test_an_exemplar_points_to_a_trace_that_is_recorded() -> None:
    assert exemplar() is None
    assert exemplar(begun()) is None
    sampled = begun(parent=TraceContext(0xABC, 6, True), sampled=True)
    assert exemplar(sampled) == {"trace_id": f"{0xABC:032x}"}
    token = current.set(sampled)
    try:
        assert exemplar() == exemplar(sampled)
    finally:
        current.reset(token)


def test_the_end_is_the_first_that_is_said() -> None:
    timeline = begun()
    timeline.end("cancelled")
    timeline.end("ok")
    assert timeline.status == "cancelled"


def test_what_has_ended_keeps_no_request() -> None:
    """Nor one that was refused on its way to a replica, whose sequence has no end of its own."""
    timeline = Timeline("r", "ingress", "generate")
    track = timeline.begin_track("r", "tiny", 5)
    track.tokens_so_far = lambda: 3
    timeline.end("failed", "Unavailable")
    assert track.tokens_so_far is None
    assert timeline.output_tokens == 3
