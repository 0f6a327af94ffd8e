from __future__ import annotations

import itertools

import pytest

from hycluster.stages import AFTER, MEANINGS, PARKED, Stage, stages_of, summed_up, timeline_json
from hycluster.timeline import Timeline
from tests.timelines import (
    BEGAN_S,
    PREEMPTED,
    QUEUED,
    SCHEDULED,
    begun,
    ended,
    finished,
    goes,
    heard,
    migrated,
    noted,
    sent,
    usual,
)


def times(timeline: Timeline) -> list[tuple[str, float]]:
    return [(stage.name, round(stage.duration_s, 6)) for stage in stages_of(timeline)]


def add_up(found: list[Stage], timeline: Timeline) -> None:
    assert sum(stage.duration_s for stage in found) == pytest.approx(timeline.duration_s)
    assert found[0].start_s == 0
    for stage, following in itertools.pairwise(found):
        assert following.start_s == pytest.approx(stage.end_s)


def test_each_moment_of_a_request_is_in_one_stage() -> None:
    timeline = usual()
    found = stages_of(timeline)
    assert times(timeline) == [
        ("receive", 0.1),
        ("prepare", 0.2),
        ("send", 0.2),
        ("queue", 0.2),
        ("prefill", 0.3),
        ("decode", 1.0),
        ("deliver", 0.2),
    ]
    add_up(found, timeline)
    assert [stage.attributes.get("replica") for stage in found] == [None, None, "r0", "r0", "r0", "r0", None]


def test_a_lost_replicas_pause_is_a_stage() -> None:
    timeline = migrated()
    assert times(timeline) == [
        ("receive", 0.1),
        ("prepare", 0.1),
        ("send", 0.1),
        ("queue", 0.1),
        ("prefill", 0.6),
        ("decode", 0.5),
        ("migrate", 0.5),
        ("send", 0.1),
        ("queue", 0.1),
        ("prefill", 0.4),
        ("decode", 0.4),
    ]
    add_up(stages_of(timeline), timeline)
    assert [stage.attributes["replica"] for stage in stages_of(timeline) if stage.name == "decode"] == ["r0", "r1"]


def test_waits_and_preemptions_are_stages() -> None:
    timeline = begun()
    noted(timeline, 0.0, "waiting", reason="a place in the engines")
    noted(timeline, 0.5, "admitted")
    track = timeline.begin_track("a", "tiny", 3)
    track.note("waiting", BEGAN_S + 1.0, reason="model start")
    goes(track, 5.0, "r0")
    heard(track, 5.3, (QUEUED, 5.0), (SCHEDULED, 5.1))
    heard(track, 7.0, (PREEMPTED, 6.0), (SCHEDULED, 6.5))
    finished(track, 8.0)
    ended(timeline, 8.0)
    assert times(timeline) == [
        ("wait", 0.5),
        ("prepare", 0.5),
        ("wait", 4.0),
        ("queue", 0.1),
        ("prefill", 0.2),
        ("decode", 0.7),
        ("preempted", 0.5),
        ("prefill", 0.5),
        ("decode", 1.0),
    ]
    add_up(stages_of(timeline), timeline)
    assert stages_of(timeline)[2].attributes == {"reason": "model start"}


def test_what_a_row_was_parked_for_is_taken_out_of_its_decoding() -> None:
    timeline = usual()
    timeline.tracks[0].parked_s = 0.7
    assert times(timeline)[4:] == [("prefill", 0.3), (PARKED, 0.7), ("decode", 0.3), ("deliver", 0.2)]
    add_up(stages_of(timeline), timeline)
    timeline.tracks[0].parked_s = 1.1
    assert times(timeline)[4:] == [(PARKED, 0.1), ("prefill", 0.2), (PARKED, 1.0), ("deliver", 0.2)]
    add_up(stages_of(timeline), timeline)


def test_of_sequences_beside_each_other_the_one_that_was_waited_for_is_told() -> None:
    timeline = begun()
    slow, quick = sent(timeline, 0.1, name="slow"), sent(timeline, 0.1, "r1", name="quick")
    heard(quick, 0.3, (QUEUED, 0.1), (SCHEDULED, 0.1))
    finished(quick, 0.5)
    heard(slow, 2.0, (QUEUED, 0.1), (SCHEDULED, 1.9))
    finished(slow, 3.0)
    ended(timeline, 3.0)
    assert times(timeline) == [("receive", 0.1), ("queue", 1.8), ("prefill", 0.1), ("decode", 1.0)]


def test_sequences_one_after_the_other_are_all_told() -> None:
    timeline = begun()
    noted(timeline, 0.1, "admitted")
    for start_s in (0.2, 2.0):
        track = sent(timeline, start_s, name=f"at-{start_s}")
        heard(track, start_s + 0.3, (QUEUED, start_s), (SCHEDULED, start_s + 0.1))
        finished(track, start_s + 1.0)
    ended(timeline, 3.2)
    assert times(timeline) == [
        ("receive", 0.1),
        ("prepare", 0.1),
        ("queue", 0.1),
        ("prefill", 0.2),
        ("decode", 0.7),
        ("prepare", 0.8),
        ("queue", 0.1),
        ("prefill", 0.2),
        ("decode", 0.7),
        ("deliver", 0.2),
    ]


def test_a_request_that_is_on_its_way_is_told_until_now() -> None:
    timeline = Timeline("r", "ingress", "row")
    timeline.begin_track("a", "tiny", 3).routed("r0", [], 0, None)
    said = timeline_json(timeline)
    assert said["status"] == "running"
    assert {span["name"] for span in said["spans"]} <= {"receive", "send"}


def test_what_is_told_is_json_and_adds_up() -> None:
    said = timeline_json(usual())
    assert {name: said[name] for name in ("id", "model", "status", "duration_s", "ttft_s", "slowest_stage")} == {
        "id": "r",
        "model": "tiny",
        "status": "ok",
        "duration_s": 2.2,
        "ttft_s": 1.0,
        "slowest_stage": "decode",
    }
    assert said["started"] == "2027-01-15T08:00:00.000+00:00"
    assert sum(span["duration_s"] for span in said["spans"]) == pytest.approx(2.2)
    assert [event["name"] for event in said["events"]] == [
        "received", "admitted", "routed", "sent", "queued", "scheduled", "first_token", "finished", "delivered",
    ]  # fmt: skip
    assert said["trace_id"] is None
    assert summed_up(usual()).items() <= said.items()


def test_every_stage_has_its_meaning() -> None:
    assert {name for name, _ in AFTER.values()} | {PARKED} == set(MEANINGS)
