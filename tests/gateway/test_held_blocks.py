from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from hycluster.engine.block_changes import BlockChanges
from hycluster.gateway.held_blocks import HeldBlocks


def changes(stored: Iterable[int] = (), dropped: Iterable[int] = (), *, whole: bool = False) -> BlockChanges:
    return BlockChanges(1, whole, np.array([*stored], np.uint64), np.array([*dropped], np.uint64))


def test_the_leading_blocks_of_each_replica() -> None:
    index = HeldBlocks()
    index.take("a", changes([1, 2, 3, 2**64 - 1], whole=True))
    index.take("b", changes([1, 3], whole=True))
    index.take("c", changes(whole=True))
    assert index.matched([1, 2, 3, 4]) == {"a": 3, "b": 1}
    assert index.matched([1]) == {"a": 1, "b": 1}
    assert index.matched([4, 1]) == index.matched([]) == {}
    assert (index.holds("a", 2**64 - 1), index.holds("b", 2), index.holds("none", 1)) == (True, False, False)
    assert index.blocks == 6
    index.take("a", changes([4], [1]))
    assert index.matched([1, 2, 3, 4]) == {"b": 1}
    assert index.matched([2, 3, 4]) == {"a": 3}


def test_a_replica_that_is_gone_leaves_nothing() -> None:
    index = HeldBlocks()
    for replica in "ab":
        index.take(replica, changes([1, 2], whole=True))
    index.forget("a")
    index.forget("a")
    assert index.matched([1, 2]) == {"b": 2}
    index.take("c", changes([2], whole=True))
    assert index.matched([2]) == {"b": 1, "c": 1}
    for replica in "bc":
        index.forget(replica)
    assert (index.blocks, index._holders) == (0, {})


def test_a_whole_one_replaces_what_was_said() -> None:
    index = HeldBlocks()
    index.take("a", changes([1, 2], whole=True))
    index.take("a", changes([3], whole=True))
    assert (index.matched([1]), index.matched([3]), index.blocks) == ({}, {"a": 1}, 1)


def test_it_finds_what_a_search_of_each_replica_finds() -> None:
    chance = random.Random(5)
    index, held = HeldBlocks(), {str(number): set[int]() for number in range(70)}
    for replica in held:
        index.take(replica, changes(whole=True))
    for turn in range(2000):
        replica = chance.choice([*held])
        if chance.random() < 0.02:
            index.forget(replica)
            held[replica] = set()
        stored = {chance.randrange(40) for _ in range(chance.randrange(8))} - held[replica]
        dropped = set(chance.sample(sorted(held[replica]), len(held[replica]) // 4))
        index.take(replica, changes(stored, dropped))
        held[replica] = (held[replica] | stored) - dropped
        names = [chance.randrange(40) for _ in range(chance.randrange(6))]
        expected = {
            replica: next((depth for depth, name in enumerate(names) if name not in blocks), len(names))
            for replica, blocks in held.items()
        }
        assert index.matched(names) == {replica: depth for replica, depth in expected.items() if depth}, turn
    assert index.blocks == sum(map(len, held.values()))
