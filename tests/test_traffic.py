from __future__ import annotations

import pytest

from hycluster.traffic import KEEP_MINUTES, Minute, ModelTraffic, TrafficMeter, class_of, quantile, together


class Clock:
    def __init__(self) -> None:
        self.now_s = 6000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("seconds", [0.0004, 0.002, 0.05, 0.9, 12.0, 300.0])
def test_quantiles_are_right_to_an_eighth(seconds: float) -> None:
    found = quantile({class_of(seconds): 7}, 0.5)
    assert found is not None
    assert found == pytest.approx(max(seconds, 0.001), rel=0.13)


def test_quantile_of_many() -> None:
    counts = {class_of(0.1): 90, class_of(1.0): 9, class_of(10.0): 1}
    for share, seconds in ((0.5, 0.1), (0.9, 0.1), (0.95, 1.0), (1.0, 10.0)):
        assert quantile(counts, share) == pytest.approx(seconds, rel=0.13)
    assert quantile({}, 0.5) is None


def test_an_hour_is_kept_and_no_more() -> None:
    clock = Clock()
    meter = TrafficMeter(clock)
    meter.answer(10, 4, 3, 0.02)
    clock.now_s += 60 * (KEEP_MINUTES - 1)
    meter.answer(20, 0, 1, 0.0)
    assert [minute.answered for minute in meter.last_hour.values()] == [1, 1]
    clock.now_s += 60
    # Nothing new is needed for the old to go.
    assert [minute.prompt_tokens for minute in meter.last_hour.values()] == [20]
    meter.refuse("overloaded")
    assert len(meter.last_hour) == 2


def test_both_views_are_of_one_count() -> None:
    clock = Clock()
    meter = TrafficMeter(clock)
    meter.refuse("overloaded")
    meter.fail("ReplicaLost")
    meter.cancel(2)
    clock.now_s += 3600
    meter.refuse("overloaded")
    meter.refuse("unavailable")
    meter.fail("RequestFailed")
    # What the page shows is of the last hour, what is scraped only grows.
    (last,) = meter.last_hour.values()
    assert last == Minute(failed=1, shed=1, unavailable=1)
    assert meter.refused == {"overloaded": 2, "unavailable": 1}
    assert meter.failed == {"ReplicaLost": 1, "RequestFailed": 1}
    assert meter.cancelled == 2


def test_one_token_has_no_time_for_each_further_one() -> None:
    meter = TrafficMeter(Clock())
    meter.answer(1, 0, 1, 0.0)
    meter.first_token(0.2)
    (minute,) = meter.last_hour.values()
    assert (minute.tpot, minute.ttft) == ({}, {class_of(0.2): 1})


def test_all_ingress_processes_together() -> None:
    one = ModelTraffic({1: Minute(answered=2, failed=1, ttft={3: 2})}, {1: Minute(answered=9)})
    two = ModelTraffic(
        {1: Minute(answered=3, shed=4, unavailable=2, ttft={3: 1, 5: 2}), 2: Minute(cancelled=1)},
        {1: Minute(answered=4), 3: Minute(failed=1)},
    )
    both = together([one, two])
    assert both.minutes == {
        1: Minute(answered=5, failed=1, shed=4, unavailable=2, ttft={3: 3, 5: 2}),
        2: Minute(cancelled=1),
    }
    assert both.batch_minutes == {1: Minute(answered=13), 3: Minute(failed=1)}
    # What was put together is what each said, unchanged.
    assert one.minutes[1].answered == 2
    assert (both.minutes[1].owed, both.minutes[1].asked) == (8, 12)
