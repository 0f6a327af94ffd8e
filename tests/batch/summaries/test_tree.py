from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.batch.job import Summary
from hycluster.batch.summaries.tree import SEAM_TOKENS, Budget, budget, plan_merges
from hycluster.errors import SettingsError

# Tokens of each prompt without its text.
PROMPT = {"whole": 10, "part": 20, "merge": 30}


@pytest.mark.parametrize(
    ("context", "settings", "said"),
    [
        (
            2000,
            {"part_tokens": 1950},
            r"^summary.part_tokens: 1950 is not allowed; must be at most 1\d\d\d in a context of",
        ),
        (2000, {"part_tokens": 100, "overlap_tokens": 50}, None),
        (2000, {"overlap_tokens": 990}, "^summary.overlap_tokens: 990 is not allowed; must be at most"),
        (100, {}, "^model: a context of 100 tokens is too small"),
    ],
)
def test_settings_that_the_context_does_not_allow(context: int, settings: dict[str, int], said: str | None) -> None:
    if said is None:
        assert budget(context, 40, Summary.model_validate(settings), **PROMPT).part == settings["part_tokens"]
        return
    with pytest.raises(SettingsError, match=said):
        budget(context, 40, Summary.model_validate(settings), **PROMPT)


@given(context=st.integers(256, 300_000), max_tokens=st.none() | st.integers(1, 300_000))
def test_every_call_has_room_for_its_answer_and_merges_shrink(context: int, max_tokens: int | None) -> None:
    shares: Budget = budget(context, max_tokens, Summary(), **PROMPT)
    assert shares.part + shares.summary + PROMPT["part"] < context
    assert shares.merge + shares.summary + PROMPT["merge"] <= context
    assert 4 * (shares.summary + SEAM_TOKENS) <= shares.merge
    assert shares.whole + PROMPT["whole"] < context
    if max_tokens and max_tokens <= context // 2:
        assert max(shares.whole + PROMPT["whole"], shares.merge + PROMPT["merge"]) + max_tokens <= context


@given(tokens=st.lists(st.integers(1, 30), max_size=60), room=st.integers(1, 100))
def test_merges_are_of_neighbours_that_fit(tokens: list[int], room: int) -> None:
    runs = plan_merges(tokens, room)
    assert [place for run in runs for place in run] == list(range(len(tokens)))
    assert all(len(run) == 1 or sum(tokens[place] for place in run) <= room for run in runs)
    if tokens and sum(tokens) <= room:
        assert len(runs) == 1
    if any(a + b <= room for a, b in pairwise(tokens)) and max(tokens) * 2 <= room:
        assert len(runs) <= (len(tokens) + 1) // 2


def test_merges_are_even() -> None:
    assert [len(run) for run in plan_merges([10] * 22, 100)] == [8, 8, 6]
