from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.chaos.schedule import Fault, FaultKind, FaultOptions, Pick, Where, pause, schedule, weights
from hycluster.errors import SettingsError

MIXED = {FaultKind.KILL: 3.0, FaultKind.STOP: 1.0, FaultKind.DELAY: 1.0}


def test_the_seed_settles_it() -> None:
    wish = FaultOptions(seed=7, count=20, kinds=MIXED, places={Where.REPLICA: 1, Where.INGRESS: 1}, together=2)
    assert schedule(wish) == schedule(wish)
    assert schedule(wish) != schedule(FaultOptions(seed=8, count=20, kinds=MIXED, together=2))


@given(st.integers(0, 60), st.integers())
def test_each_kind_has_its_share_whatever_the_seed(count: int, seed: int) -> None:
    faults = schedule(FaultOptions(seed=seed, count=count, kinds=MIXED))
    assert [fault.number for fault in faults] == list(range(count))
    kinds = Counter(fault.kind for fault in faults)
    for kind, weight in MIXED.items():
        assert abs(kinds[kind] - count * weight / 5) < 1


def test_so_many_together_once_and_on_replicas() -> None:
    faults = schedule(FaultOptions(count=10, places={Where.REPLICA: 1, Where.INGRESS: 4}, together=3))
    assert sorted(len(fault.picks) for fault in faults) == [1] * 9 + [3]
    (many,) = [fault for fault in faults if len(fault.picks) == 3]
    assert many.where is Where.REPLICA


def test_when() -> None:
    assert {fault.pause_s for fault in schedule(FaultOptions(every_s=10.0))} == {10.0}
    pauses = [fault.pause_s for fault in schedule(FaultOptions(count=50))]
    assert len(set(pauses)) == 50
    assert all(1 <= pause_s <= 3 for pause_s in pauses)


def test_nobody_is_hit_twice_by_one_fault() -> None:
    picks = tuple(Pick(place, 0.5) for place in (0.99, 0.0, 0.99))
    fault = Fault(0, FaultKind.KILL, Where.REPLICA, 0.0, picks)
    assert [target for target, _ in fault.choose("abcd")] == ["d", "a", "c"]
    assert [target for target, _ in fault.choose("ab")] == ["b", "a"]
    assert fault.choose("") == []


def test_shares_by_name() -> None:
    assert weights("--faults", "kill=3, stop", FaultKind) == {FaultKind.KILL: 3, FaultKind.STOP: 1}
    for wrong in ("", "kil", "kill=0", "kill=x", "kill=nan", "kill=inf", "kill=-1"):
        with pytest.raises(SettingsError, match=r"--faults: .*kill, stop, delay"):
            weights("--faults", wrong, FaultKind)


def test_how_often() -> None:
    assert pause("whole") is None
    assert pause("10s") == pause("10") == 10
    for wrong in ("", "0", "-1s", "hole", "nan", "inf"):
        with pytest.raises(SettingsError, match="--every: "):
            pause(wrong)
