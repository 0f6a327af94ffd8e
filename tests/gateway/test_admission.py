"""Who is let in, and what those hear who are not."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.errors import InvalidInput, Overloaded
from hycluster.gateway.admission import LEAST_RETRY_AFTER_S, PACE_WINDOW_S, Gate, Pace, check_id
from hycluster.settings.load import Admission


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(gate: Gate, **state: Any) -> float:
    """Seconds that the caller is told to wait."""
    with pytest.raises(Overloaded) as caught:
        gate.check(**({"sequences": 1, "in_flight": 10, "outstanding_tokens": 1000} | state))
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s


def test_pace_is_that_of_the_last_seconds(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.tokens_per_s(0) is None
    done = 0
    for tokens_per_s in (10, 50):
        for _ in range(int(PACE_WINDOW_S) + 5):
            pace.note(done)
            clock.now += 1
            done += tokens_per_s
    assert pace.tokens_per_s(done) == pytest.approx(50)


def test_pace_keeps_few_samples_however_often_it_is_told(clock: Clock) -> None:
    pace = Pace(clock)
    for number in range(10_000):
        pace.note(number)
        clock.now += 0.001
    assert pace.tokens_per_s(10_000) == pytest.approx(1000, rel=0.05)
    assert len(pace._samples) <= 21


def test_retry_after_is_the_time_until_there_is_room(clock: Clock) -> None:
    gate = Gate("m", Admission(max_requests=10), clock)
    gate.check(1, in_flight=9, outstanding_tokens=1000, worked_off_tokens=0)
    clock.now += 4
    # 20 tokens a second; a tenth of 1000 tokens must be worked off for a place, all of them for ten places.
    assert refused(gate, worked_off_tokens=80) == pytest.approx(5)
    assert refused(gate, worked_off_tokens=80, sequences=10) == pytest.approx(50)


def test_the_bound_on_tokens(clock: Clock) -> None:
    gate = Gate("m", Admission(max_requests=None, max_outstanding_tokens=500), clock)
    gate.check(1, in_flight=10**6, outstanding_tokens=499, worked_off_tokens=0)
    clock.now += 10
    assert refused(gate, outstanding_tokens=599, worked_off_tokens=100) == pytest.approx(10)
    assert refused(gate, outstanding_tokens=500, worked_off_tokens=100) == LEAST_RETRY_AFTER_S


def test_without_a_pace_the_least_and_without_any_progress_the_most(clock: Clock) -> None:
    gate = Gate("m", Admission(max_requests=10, max_retry_after_s=40), clock)
    assert refused(gate, worked_off_tokens=0) == LEAST_RETRY_AFTER_S
    clock.now += 2
    assert refused(gate, worked_off_tokens=0) == 40
    assert refused(gate, worked_off_tokens=1) == 40


def test_what_is_never_admitted_is_not_told_to_come_back(clock: Clock) -> None:
    with pytest.raises(InvalidInput, match="n: 11 sequences are not allowed; a request may ask for at most 10"):
        Gate("m", Admission(max_requests=10), clock).check(11, in_flight=0, outstanding_tokens=0, worked_off_tokens=0)


def test_requests_that_wait_for_a_replica_count_without_tokens(clock: Clock) -> None:
    gate = Gate("m", Admission(max_requests=10), clock)
    refused(gate, worked_off_tokens=0)
    clock.now += 2
    assert refused(gate, outstanding_tokens=0, worked_off_tokens=10) == LEAST_RETRY_AFTER_S


def test_ids_have_a_bound() -> None:
    check_id("request_id", None)
    check_id("request_id", "x" * 512)
    with pytest.raises(InvalidInput, match=r"session_id: 'xxx.* is too long; at most 512 characters are allowed"):
        check_id("session_id", "x" * 513)
    with pytest.raises(InvalidInput, match=r"request_id: 'a.ud800' is not allowed; must be text that UTF-8 can hold"):
        check_id("request_id", "a\ud800")
