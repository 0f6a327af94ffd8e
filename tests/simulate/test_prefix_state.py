from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from hycluster.simulate.prefix_state import PrefixState


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["sent", "stored", "dropped"]), st.integers(0, 2), st.integers(0, 9)), max_size=60
    )
)
def test_it_knows_what_was_stored_and_not_dropped(steps: list[tuple[str, int, int]]) -> None:
    state, model = PrefixState(3), [set[int](), set[int](), set[int]()]
    for now_s, (what, replica, block) in enumerate(steps):
        if what == "sent":
            state.sent(replica, range(block), now_s)
            model[replica] |= set(range(block))
        elif what == "stored":
            state.stored(replica, block, now_s)
            model[replica].add(block)
        else:
            state.dropped(replica, block)
            model[replica].discard(block)
    longest = [next(depth for depth in range(11) if depth not in held) for held in model]
    assert state.cached_blocks(range(10)).tolist() == longest
    assert state.cached_blocks([]).tolist() == [0, 0, 0]


def test_how_long_what_goes_next_was_not_used() -> None:
    state = PrefixState(2)
    state.sent(0, [1, 2], 0.0)
    state.sent(0, [3], 4.0)
    assert state.evicts_age_s(10.0).tolist() == [math.inf, math.inf], "as long as nothing has gone there is room"
    state.dropped(0, 2)
    assert state.evicts_age_s(10.0).tolist() == [10.0, math.inf]
    state.sent(0, [1], 9.0)
    assert state.evicts_age_s(10.0).tolist() == [6.0, math.inf]
