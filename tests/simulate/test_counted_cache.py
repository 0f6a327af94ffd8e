from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from hycluster.simulate.counted_cache import CountedCache
from hycluster.simulate.traces import HASH_TOKENS, TraceRequest, hit_tokens


class Told:
    """What a cache says that it has."""

    def __init__(self, blocks: int) -> None:
        self.has: set[int] = set()
        self.dropped: list[int] = []
        self.cache = CountedCache(blocks * HASH_TOKENS, self._store, self._drop)

    def _store(self, block: int) -> None:
        assert block not in self.has
        self.has.add(block)

    def _drop(self, block: int) -> None:
        self.has.remove(block)
        self.dropped.append(block)

    def serve(self, *blocks: int, more: int = 0) -> int | None:
        found = self.cache.take(blocks, more)
        if found is not None:
            self.cache.let_go(blocks, more)
        return found


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    told = Told(4)
    assert [told.serve(1, 2, 3), told.serve(1, 2, 4)] == [0, 2]
    assert told.serve(5) == 0
    assert told.dropped == [3]
    assert told.serve(6, 7) == 0
    assert told.dropped == [3, 4, 2]
    assert told.cache.matched([1, 2]) == 1


def test_what_a_request_holds_stays() -> None:
    told = Told(4)
    assert told.cache.take([1, 2], 0) == 0
    assert told.serve(3, 4) == 0
    assert told.cache.take([5, 6, 7], 0) is None, "there is no room, and nothing has gone"
    assert told.has == {1, 2, 3, 4}
    assert told.cache.take([1, 9, 3], 0) == 1, "what is behind the gap is there too"
    assert told.has == {1, 2, 3, 9}
    assert told.cache.take([5], 0) is None


def test_outputs_take_room_and_nothing_finds_them() -> None:
    told = Told(3)
    assert told.serve(1, more=2 * HASH_TOKENS) == 0
    assert told.cache.free_tokens == 3 * HASH_TOKENS
    assert told.serve(2, more=1) == 0
    assert told.has == {1, 2}, "what was let go first is the output"


prompts = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)).map(
        # A block's name says all that is before it.
        lambda path: tuple(sum((step + 1) * 10**at for at, step in enumerate(path[: depth + 1])) for depth in range(3))
    ),
    max_size=60,
)


@given(prompts=prompts, blocks=st.integers(3, 20))
def test_one_after_the_other_it_is_an_lru(prompts: Sequence[tuple[int, ...]], blocks: int) -> None:
    """As much as the bound that figures are held against."""
    told = Told(blocks)
    found = sum((told.serve(*each) or 0) * HASH_TOKENS for each in prompts)
    requests = [TraceRequest(0, 3 * HASH_TOKENS + 1, 1, (*each, 0)) for each in prompts]
    assert found == hit_tokens(requests, blocks * HASH_TOKENS)
    assert len(told.has) <= blocks


@given(
    steps=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(0, 2000)), max_size=60),
    blocks=st.integers(1, 12),
)
def test_room_is_never_lost(steps: Sequence[tuple[int, int, int]], blocks: int) -> None:
    told, running = Told(blocks), list[tuple[tuple[int, ...], int]]()
    for first, count, more in steps:
        taken = tuple(100 * first + number for number in range(count))
        if told.cache.take(taken, more) is not None:
            running.append((taken, more))
        if len(running) > 2:
            told.cache.let_go(*running.pop(0))
        assert 0 <= told.cache.free_tokens <= blocks * HASH_TOKENS
        held = {block for each, _ in running for block in each}
        assert held <= told.has
        used = len(held) * HASH_TOKENS + sum(extra for _, extra in running)
        assert told.cache.free_tokens == blocks * HASH_TOKENS - used
    for each in running:
        told.cache.let_go(*each)
    assert told.cache.free_tokens == blocks * HASH_TOKENS
