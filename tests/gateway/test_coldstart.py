from __future__ import annotations

from typing import Any

import pytest

from hycluster.directory.autoscaling import Scaling
from hycluster.gateway.coldstart import LATE_S, NOTICED_AFTER_S, UNKNOWN_RETRY_AFTER_S, ColdStart
from hycluster.settings.model import Model
from hycluster.settings.pool import Autoscaling, Replicas


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def model(**rules: Any) -> Model:
    return Model(name="m", source="/m", replicas=Replicas(min=0, max=2), autoscaling=Autoscaling(**rules))


def refusing(clock: Clock, scaling: Scaling | None = None) -> ColdStart:
    cold_start = ColdStart(model(cold_start="refuse"), clock=clock)
    cold_start.hear(scaling)
    return cold_start


def test_who_waits_and_for_how_long() -> None:
    assert ColdStart(model(max_cold_start_wait_s=7)).wait_s == 7
    assert ColdStart(model(cold_start="refuse")).wait_s is None
    assert ColdStart(model(cold_start="refuse", max_cold_start_wait_s=7), patient=True).wait_s == 7
    always_there = ColdStart(Model(name="m", source="/m"), patient=True)
    assert always_there.wait_s is None
    assert not always_there.wakes


@pytest.mark.parametrize(
    ("scaling", "retry_after_s"),
    [
        (None, UNKNOWN_RETRY_AFTER_S),
        (Scaling(0, 0), UNKNOWN_RETRY_AFTER_S),
        # It is still to begin.
        (Scaling(0, 0, None, 40.0), 40.0 + NOTICED_AFTER_S),
        (Scaling(1, 0, 15.0, 40.0), 25.0),
        # It takes longer than the last one.
        (Scaling(1, 0, 50.0, 40.0), 1.0),
    ],
)
def test_when_to_come_back(scaling: Scaling | None, retry_after_s: float, clock: Clock) -> None:
    assert refusing(clock, scaling).refusal().retry_after_s == retry_after_s


def test_what_is_said(clock: Clock) -> None:
    assert refusing(clock).refusal().message == (
        "model: 'm' is starting, as nobody had asked for it; how long that takes is not known yet"
    )
    assert refusing(clock, Scaling(1, 0, 2.0, 43.4)).refusal().message == (
        "model: 'm' is starting, as nobody had asked for it; the last start took 43 s"
    )
    fixed = ColdStart(Model(name="m", source="/m")).refusal()
    assert (fixed.message, fixed.retry_after_s) == ("model: no replica of 'm' can serve now", 1.0)


def test_who_was_refused_is_awaited_until_they_should_be_back(clock: Clock) -> None:
    cold_start = refusing(clock, Scaling(1, 0, 10.0, 40.0))
    assert cold_start.awaited == 0
    cold_start.refusal()
    clock.now_s += 30 + LATE_S - 1
    assert cold_start.awaited == 1
    clock.now_s += 1
    assert cold_start.awaited == 0


def test_the_one_who_comes_back_last_is_awaited(clock: Clock) -> None:
    cold_start = refusing(clock, Scaling(0, 0, None, 40.0))
    cold_start.refusal()
    cold_start.hear(Scaling(1, 0, 39.0, 40.0))
    cold_start.refusal()
    clock.now_s += 40
    assert cold_start.awaited == 1


def test_a_pool_of_fixed_size_awaits_nobody(clock: Clock) -> None:
    cold_start = ColdStart(Model(name="m", source="/m"), clock=clock)
    cold_start.refusal()
    assert cold_start.awaited == 0


def test_somebody_who_is_no_request(clock: Clock) -> None:
    cold_start = refusing(clock)
    cold_start.want()
    clock.now_s += 10_000
    assert cold_start.awaited == 1
    cold_start.want_no_more()
    assert cold_start.awaited == 0


def test_a_scaler_that_is_new_does_not_make_it_forget(clock: Clock) -> None:
    cold_start = refusing(clock, Scaling(1, 1, None, 40.0))
    for scaling in (None, Scaling(0, 0)):
        cold_start.hear(scaling)
        assert cold_start.refusal().retry_after_s == 40 + NOTICED_AFTER_S


def test_asleep_is_what_the_scaler_says(clock: Clock) -> None:
    cold_start = refusing(clock)
    seen = []
    for scaling in (None, Scaling(0, 1), Scaling(1, 0), Scaling(0, 0), None):
        cold_start.hear(scaling)
        seen.append(cold_start.asleep.is_set())
    assert seen == [False, True, False, True, False]
