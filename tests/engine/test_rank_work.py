from __future__ import annotations

import pytest

from hycluster.engine.rank_work import ARRIVAL, RankWork, Siblings
from hycluster.engine.step_time import StepWork


def test_what_changed_materially_is_told_and_no_more() -> None:
    told: list[RankWork] = []
    siblings = Siblings(told.append)
    works = [
        RankWork(0, 1, 100, 1, 100),
        RankWork(0, 1, 2000, 1, 2000),
        RankWork(0, 3, 2000, 3, 2000),
        RankWork(500, 4, 2000, 4, 2000),
        RankWork(0, 4, 9000, 4, 9000),
        RankWork(0, 4, 9000, 0, 0),
    ]
    for work in works:
        siblings.tell(work)
    assert told == [works[0], works[3], works[4], works[5]]


def test_an_arrival_is_told_once() -> None:
    told: list[RankWork] = []
    siblings = Siblings(told.append)
    siblings.tell_arrival()
    siblings.tell_arrival()
    siblings.tell(RankWork(40, 1, 0, 1, 0))
    assert told == [ARRIVAL]
    siblings.tell(RankWork())
    siblings.tell_arrival()
    assert told == [ARRIVAL, RankWork(), ARRIVAL]


def test_an_engine_by_itself_tells_nobody() -> None:
    siblings = Siblings()
    assert not siblings
    siblings.tell(ARRIVAL)
    assert siblings.online_work is None
    assert siblings.longest(StepWork(1, 2, 3)) == StepWork(1, 2, 3)


@pytest.mark.parametrize(
    ("heard", "online", "longest"),
    [
        ({1: RankWork(100, 9, 50)}, None, StepWork(100, 9, 70, elsewhere_tokens=33)),
        (
            {1: RankWork(0, 2, 900, 2, 900), 2: RankWork(0, 7, 80, 4, 60)},
            StepWork(0, 4, 900, elsewhere_tokens=2),
            StepWork(30, 7, 900, elsewhere_tokens=5),
        ),
    ],
)
def test_what_they_say(heard: dict[int, RankWork], online: StepWork | None, longest: StepWork) -> None:
    siblings = Siblings(lambda _: None)
    for rank, work in heard.items():
        siblings.hear(rank, work)
    assert siblings.online_work == online
    own = StepWork(30, 3, 70)
    assert siblings.longest(own) == longest
    assert longest.routed_tokens == own.routed_tokens + siblings.tokens, "experts are read for the tokens of all ranks"
    assert siblings.ranks == 1 + len(heard)
