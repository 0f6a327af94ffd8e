from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hycluster.chaos.pool import IngressProcesses, PoolMembers
from hycluster.chaos.schedule import Where
from hycluster.chaos.targets import Target


def members(names: str, wanted: int = 3) -> PoolMembers:
    return PoolMembers(wanted, frozenset(names))


def test_successors_are_counted_not_names() -> None:
    before = members("abc")
    assert before.whole
    # The directory still names a, which is dead.
    assert not members("abc").whole_without(before, gone=1)
    assert not members("bc").whole_without(before, gone=1)
    assert members("abcd").whole_without(before, gone=1)
    assert members("bcd").whole_without(before, gone=1)
    assert not members("bcd").whole_without(before, gone=2)
    assert members("cde").whole_without(before, gone=2)


def test_what_was_only_held_up_needs_no_successor() -> None:
    assert members("abc").whole_without(members("abc"), gone=0)
    assert not members("ab").whole_without(members("abc"), gone=0)
    assert not members("ab").whole


def test_ingress_processes_listen_and_have_gateways() -> None:
    one, other = (Target(Where.INGRESS, name, name, "node", 1) for name in "ab")
    both: Any = SimpleNamespace(listening=lambda ports: [one, other] if ports == (1, 2) else [])
    ingresses = IngressProcesses(2, (1, 2))
    before, after = (PoolMembers(1, frozenset("r"), frozenset(gateways)) for gateways in ("ab", "bc"))
    assert ingresses.whole_without(both, [], before, after, gone=1)
    # It listens, but has only begun.
    assert not ingresses.whole_without(both, [], before, before, gone=1)
    assert ingresses.whole_without(both, [], before, before, gone=0)
    # One that is stopped listens too.
    assert not ingresses.whole_without(both, [one], before, after, gone=1)
