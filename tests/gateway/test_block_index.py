from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.gateway.block_index import BlockIndex, Hashes


def random_hashes(count: int, seed: int) -> Hashes:
    return np.random.default_rng(seed).integers(1, 1 << 64, count, np.uint64, endpoint=False)


CHAIN = random_hashes(40, 1)


def index_of(*replica_ids: str, blocks: int = 1000) -> BlockIndex:
    index = BlockIndex(blocks)
    for replica_id in replica_ids:
        index.join(replica_id)
    return index


def cached(index: BlockIndex, hashes: Hashes = CHAIN) -> dict[str, int]:
    return dict(zip(index.replica_ids, index.cached_blocks(hashes).tolist(), strict=True))


@given(held=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_how_much_of_a_prompt_each_has(held: list[int]) -> None:
    index = index_of(*map(str, range(len(held))))
    for replica, count in enumerate(held):
        index.store(str(replica), CHAIN[:count])
    assert list(cached(index).values()) == held
    assert index.held_by_any(CHAIN[0]) == (max(held) > 0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["store", "drop"]), st.sampled_from("abc"), st.integers(0, 40)),
            st.tuples(st.sampled_from(["leave", "join"]), st.sampled_from("abc"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_it_holds_what_was_stored_and_not_dropped(steps: list[tuple[str, str, int]]) -> None:
    """Against sets: prefixes come from their begin and go from their end."""
    index, model = index_of("a"), {"a": 0}
    for what, replica, count in steps:
        if what == "join":
            # Again: it has lost all.
            index.join(replica)
            model[replica] = 0
        elif replica not in model:
            continue
        elif what == "leave":
            index.leave(replica)
            del model[replica]
        elif what == "store":
            index.store(replica, CHAIN[:count])
            model[replica] = max(model[replica], count)
        else:
            index.drop(replica, CHAIN[count:])
            model[replica] = min(model[replica], count)
    assert cached(index) == model
    assert index.left_out == 0


def test_a_replica_holds_as_many_as_it_is_made_for() -> None:
    index = index_of("a", "b", blocks=20_000)
    for number, replica in enumerate("ab"):
        for part in np.split(random_hashes(20_000, number), 40):
            index.store(replica, part)
    assert index.left_out < 20
    ours, theirs = (
        [index.cached_blocks(random_hashes(20_000, number)[at : at + 1])[0] for at in range(0, 20_000, 20)]
        for number in (0, 1)
    )
    assert sum(ours) >= 999
    assert sum(theirs) == 0
    assert index.nbytes <= 2 * 20_000 * 5.3


def test_all_can_come_at_once() -> None:
    index = index_of("a", blocks=20_000)
    index.store("a", random_hashes(20_000, 0))
    assert index.left_out < 0.005 * 20_000
    index.drop("a", random_hashes(20_000, 0))
    assert not index._table.any()


def test_what_is_stored_twice_is_dropped_once() -> None:
    index = index_of("a")
    index.store("a", np.concatenate([CHAIN, CHAIN]))
    index.store("a", CHAIN)
    index.drop("a", CHAIN)
    assert cached(index) == {"a": 0}


def test_where_there_is_no_place_a_prefix_ends() -> None:
    index = index_of("a", blocks=16)
    index.store("a", random_hashes(400, 5))
    assert index.left_out > 300
    assert (index._table != 0).sum() <= index._table.size


@pytest.mark.parametrize("replicas", [0, 1])
def test_nothing_to_ask(replicas: int) -> None:
    index = index_of(*map(str, range(replicas)))
    assert index.cached_blocks(CHAIN).tolist() == [0] * replicas
    assert index.cached_blocks(CHAIN[:0]).tolist() == [0] * replicas
    assert not index.held_by_any(CHAIN[0])
