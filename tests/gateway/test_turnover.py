from __future__ import annotations

import math

import pytest

from hycluster.gateway.turnover import Turnover


def test_who_drops_nothing_has_room() -> None:
    assert Turnover().age_s(1000, 5.0) == math.inf


@pytest.mark.parametrize("per_step", [1, 20])
def test_at_a_steady_pace_it_is_the_time_in_which_all_goes(per_step: int) -> None:
    turnover = Turnover()
    for step in range(10_000):
        turnover.note(per_step, step * 0.05)
    # 20 steps a second.
    assert turnover.age_s(12_000, 500.0) == pytest.approx(12_000 / (20 * per_step), rel=0.01)


def test_a_pause_makes_it_older_and_in_the_end_there_is_room() -> None:
    turnover = Turnover()
    turnover.note(60, 100.0)
    assert turnover.age_s(60, 100.0) == 60.0
    assert turnover.age_s(60, 160.0) == pytest.approx(60.0 * math.e)
    assert turnover.age_s(60, 3000.0) == math.inf
