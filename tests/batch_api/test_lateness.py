from __future__ import annotations

from hycluster.batch_api.lateness import Lateness


def test_a_batch_is_late_if_its_pace_is_too_low_for_what_is_left_of_its_window() -> None:
    lateness = Lateness(1000, 1000)
    # Nobody knows yet.
    assert not lateness.late(0, 1000, 0)
    assert not lateness.late(10, 990, 20)
    # A line in two seconds; 900 of them take longer than what is left.
    assert lateness.late(100, 900, 200)
    assert not lateness.late(1000 - 300, 300, 300), "since then it was fast"
    assert not lateness.late(1000, 0, 301)


def test_the_pace_is_that_of_the_last_minutes() -> None:
    lateness = Lateness(86400, 86400)
    for minute in range(10):
        assert not lateness.late(1000 * minute, 10_000, 60 * minute)
    for minute in range(10, 15):
        late = lateness.late(9000, 1000, 60 * minute)
    assert late, "nothing for as long as it is looked at"
