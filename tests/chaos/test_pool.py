from __future__ import annotations

from hycluster.chaos.pool import Members


def members(names: str, wanted: int = 3) -> Members:
    return Members(wanted, frozenset(names))


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
