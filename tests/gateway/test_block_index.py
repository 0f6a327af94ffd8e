from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.engine.block_changes import BlockChanges, Names
from hycluster.gateway.block_index import BlockIndex

NONE = np.empty(0, np.uint64)


def random_names(count: int, seed: int) -> Names:
    return np.random.default_rng(seed).integers(1, 1 << 64, count, np.uint64, endpoint=False)


CHAIN = random_names(40, 1)


def changes(stored: Iterable[int] = (), dropped: Iterable[int] = (), *, whole: bool = False) -> BlockChanges:
    return BlockChanges(1, whole, np.array([*stored], np.uint64), np.array([*dropped], np.uint64))


def index_of(*replica_ids: str, blocks: int = 1000) -> BlockIndex:
    index = BlockIndex(blocks)
    for replica_id in replica_ids:
        index.take(replica_id, changes(whole=True))
    return index


def cached(index: BlockIndex, names: Names = CHAIN) -> dict[str, int]:
    return dict(zip(index.replica_ids, index.cached_blocks(names).tolist(), strict=True))


@given(held=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_how_much_of_a_prompt_each_has(held: list[int]) -> None:
    index = index_of(*map(str, range(len(held))))
    for replica, count in enumerate(held):
        index.take(str(replica), changes(CHAIN[:count]))
    assert list(cached(index).values()) == held
    assert index.blocks == sum(held)


@pytest.mark.parametrize("replicas", [3, 40, 300])
def test_where_they_end_alike_and_where_each_ends_elsewhere(replicas: int) -> None:
    """More ends than are looked for one by one; more replicas than blocks."""
    chance, names = random.Random(replicas), random_names(500, 3)
    index, held = index_of(), dict[str, int]()
    for number in range(replicas):
        held[str(number)] = chance.choice([0, 32, 32, 32, chance.randrange(501)])
        index.take(str(number), changes(names[: held[str(number)]]))
    assert cached(index, names) == held
    assert index.cached_by_row(names)[[index.row(each) for each in held]].tolist() == list(held.values())
    deepest = max(held.values())
    assert index.held_somewhere(int(names[deepest - 1]))
    assert deepest == 500 or not index.held_somewhere(int(names[deepest]))


@given(
    blocks=st.sampled_from([1, 40, 1000]),
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["store", "drop", "whole"]), st.sampled_from("abc"), st.integers(0, 40)),
            st.tuples(st.just("forget"), st.sampled_from("abc"), st.just(0)),
        ),
        max_size=40,
    ),
)
def test_it_holds_what_was_stored_and_not_dropped(blocks: int, steps: list[tuple[str, str, int]]) -> None:
    """Against counts: prefixes come from their begin and go from their end; also where places are too few."""
    index, model = index_of("a", blocks=blocks), {"a": 0}
    for what, replica, count in steps:
        if what == "forget":
            index.forget(replica)
            model.pop(replica, None)
            continue
        if what == "store":
            index.take(replica, changes(CHAIN[:count]))
            model[replica] = max(model.get(replica, 0), count)
        elif what == "whole":
            index.take(replica, changes(CHAIN[:count], whole=True))
            model.pop(replica, None)
            model[replica] = count
        else:
            index.take(replica, changes((), CHAIN[count:]))
            model[replica] = min(model.get(replica, 0), count)
        assert index.held_by(replica) == model[replica]
    assert cached(index) == model
    assert index.blocks == sum(model.values())


def test_a_replica_holds_as_many_as_it_is_made_for() -> None:
    index = index_of("a", "b", blocks=20_000)
    for number, replica in enumerate("ab"):
        for part in np.split(random_names(20_000, number), 40):
            index.take(replica, changes(part))
    assert index.beside < 20
    ours, theirs = (
        [index.cached_blocks(random_names(20_000, number)[at : at + 1])[0] for at in range(0, 20_000, 20)]
        for number in (0, 1)
    )
    assert (sum(ours), sum(theirs)) == (1000, 0)
    assert index.nbytes <= 2 * 20_000 * 5.3


def test_more_than_it_is_made_for_are_there_too() -> None:
    names = random_names(400, 5)
    index = index_of("a", "b", blocks=16)
    index.take("a", changes(names))
    index.take("a", changes(names))
    assert index.beside > 300
    assert (cached(index, names), index.blocks) == ({"a": 400, "b": 0}, 400)
    index.take("a", changes((), names[100:]))
    assert (cached(index, names), index.blocks) == ({"a": 100, "b": 0}, 100)
    index.take("a", changes((), names))
    assert (index.blocks, index.beside) == (0, 0)
    assert not index._table.any()


def test_where_a_replica_was_another_one_finds_nothing_of_it() -> None:
    names = random_names(400, 5)
    index = index_of("a", blocks=16)
    index.take("a", changes(names))
    index.forget("a")
    index.forget("a")
    assert (index.blocks, index.beside) == (0, 0)
    index.take("b", changes(names[:1], whole=True))
    assert (cached(index, names), index.held_by("a")) == ({"b": 1}, 0)


def test_many_replicas_come_and_go() -> None:
    chance = random.Random(5)
    index, held = index_of(blocks=40), dict[str, int]()
    for _ in range(500):
        replica, count = str(chance.randrange(70)), chance.randrange(41)
        if chance.random() < 0.3:
            index.forget(replica)
            held.pop(replica, None)
        else:
            index.take(replica, changes(CHAIN[:count], whole=True))
            held[replica] = count
    assert cached(index) == held


@pytest.mark.parametrize("replicas", [0, 1])
def test_nothing_to_ask(replicas: int) -> None:
    index = index_of(*map(str, range(replicas)))
    assert index.cached_blocks(CHAIN).tolist() == [0] * replicas
    assert index.cached_blocks(NONE).tolist() == [0] * replicas
