from __future__ import annotations

import math

import numpy as np
import pytest

from hycluster.gateway.turnover import Turnover


def age_s(turnover: Turnover, held: int, now_s: float) -> float:
    """Of the second replica."""
    return float(turnover.ages_s(np.array([0, held, 7]), now_s)[1])


def test_who_drops_nothing_has_room() -> None:
    assert age_s(Turnover(), 1000, 5.0) == math.inf


@pytest.mark.parametrize("per_step", [1, 20])
def test_at_a_steady_pace_it_is_the_time_in_which_all_goes(per_step: int) -> None:
    turnover = Turnover()
    for step in range(10_000):
        turnover.note(1, per_step, step * 0.05)
    # 20 steps a second.
    assert age_s(turnover, 12_000, 500.0) == pytest.approx(12_000 / (20 * per_step), rel=0.01)


def test_a_pause_makes_it_older_and_in_the_end_there_is_room() -> None:
    turnover = Turnover()
    turnover.note(1, 60, 100.0)
    assert age_s(turnover, 60, 100.0) == 60.0
    assert age_s(turnover, 60, 160.0) == pytest.approx(60.0 * math.e)
    assert age_s(turnover, 60, 3000.0) == math.inf


def test_each_replica_has_its_own_and_one_that_comes_begins_anew() -> None:
    turnover = Turnover()
    for row, dropped in ((2, 60), (0, 30)):
        turnover.note(row, dropped, 100.0)
    assert turnover.ages_s(np.array([60, 60, 60, 60]), 100.0).tolist() == [120.0, math.inf, 60.0, math.inf]
    turnover.forget(2)
    turnover.forget(9)
    assert turnover.ages_s(np.array([60, 60]), 100.0).tolist() == [120.0, math.inf]
    assert turnover.ages_s(np.array([60, 60, 60]), 100.0).tolist() == [120.0, math.inf, math.inf]
