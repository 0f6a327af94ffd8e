"""Starts that fail: how long the next one waits, and when there is no hope."""

from __future__ import annotations

import pytest

from hycluster.directory.starts import DIED_SILENTLY, LONGEST_PAUSE_S, Starts


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def starts(clock: Clock) -> Starts:
    return Starts(clock)


def fail(starts: Starts, replica: str = "a", wanted: int = 1, kind: str = "EngineStartFailed") -> None:
    starts.begin(replica, wanted)
    starts.failed(replica, wanted, kind, "no memory")


def test_the_first_starts_do_not_wait(starts: Starts) -> None:
    assert [starts.begin(replica, 3) for replica in "abc"] == [0, 0, 0]
    assert starts.trouble is None


def test_each_pause_is_longer_than_the_one_before(starts: Starts) -> None:
    pauses = []
    for attempt in range(9):
        fail(starts)
        assert starts.trouble is not None
        assert starts.trouble.failures == attempt + 1
        pauses.append(starts.trouble.retry_in_s)
    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_all_replicas_have_their_turn_before_a_pause_grows(starts: Starts) -> None:
    pauses = []
    for attempt in range(4):
        fail(starts, f"r{attempt}", wanted=2)
        pauses.append(starts.trouble and starts.trouble.retry_in_s)
    assert pauses == [1, 1, 2, 2]


def test_a_start_waits_for_what_is_left_of_the_pause(starts: Starts, clock: Clock) -> None:
    for _ in range(4):
        fail(starts)
    clock.now_s += 3
    assert starts.begin("b", 1) == 5
    assert starts.trouble is not None
    assert starts.trouble.told() == "4 starts of replicas failed: no memory"


def test_success_forgets(starts: Starts) -> None:
    for _ in range(4):
        fail(starts)
    starts.succeeded()
    assert starts.trouble is None
    assert starts.begin("b", 1) == 0


def test_a_start_that_died_without_a_word_counts(starts: Starts) -> None:
    starts.begin("a", 1)
    assert starts.begin("b", 1) == 1
    assert starts.trouble is not None
    assert (starts.trouble.failures, starts.trouble.reason) == (1, DIED_SILENTLY)
    starts.failed("b", 1, "EngineStartFailed", "no memory")
    assert starts.trouble.failures == 2


def test_wrong_settings_are_hopeless_once_all_have_said_so(starts: Starts) -> None:
    # Another node may have what this one lacks.
    starts.begin("a", 2)
    starts.begin("b", 2)
    for _ in range(3):
        starts.failed("a", 2, "SettingsError", "source: no such folder")
        assert starts.trouble is not None
        assert not starts.trouble.hopeless
        starts.begin("a", 3)
    starts.failed("a", 2, "SettingsError", "source: no such folder")
    starts.failed("b", 2, "SettingsError", "source: no such folder")
    assert starts.trouble is not None
    assert starts.trouble.hopeless
    # The next try has begun; it will end the same.
    starts.begin("c", 2)
    assert starts.trouble is not None
    assert starts.trouble.hopeless


def test_what_may_pass_is_not_hopeless(starts: Starts) -> None:
    fail(starts)
    fail(starts, kind="SettingsError")
    assert starts.trouble is not None
    assert not starts.trouble.hopeless


def shown(starts: Starts) -> dict[str, list[tuple[str, float]]]:
    return {each.replica: [(stage.name, stage.duration_s) for stage in each.stages] for each in starts.starting}


def test_stages_are_told_with_their_times(starts: Starts, clock: Clock) -> None:
    starts.begin("a", 2)
    assert shown(starts) == {"a": [("process", 0)]}
    clock.now_s += 0.1
    starts.stage("a", "weights")
    clock.now_s += 3
    starts.stage("a", "engine")
    starts.begin("b", 2)
    clock.now_s += 20
    # That nobody made it wait is nothing to tell.
    assert shown(starts) == {"a": [("weights", 3), ("engine", 20)], "b": [("process", 20)]}
    starts.ended("a")
    starts.succeeded()
    assert shown(starts) == {"b": [("process", 20)]}
    starts.failed("b", 2, "EngineStartFailed", "no memory")
    assert shown(starts) == {}
    # Only after a failure is there a turn to wait for.
    starts.begin("b", 2)
    assert shown(starts) == {"b": [("turn", 0)]}


def test_one_that_died_silently_is_shown_no_more_when_another_one_is_in_its_place(starts: Starts) -> None:
    starts.begin("a", 1)
    starts.begin("b", 1)
    assert list(shown(starts)) == ["b"]
    starts.begin("c", 2)
    starts.succeeded()
    # b and c are forgotten as open; what comes next takes the place of the oldest.
    starts.begin("d", 2)
    assert list(shown(starts)) == ["c", "d"]
