from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hycluster.batch.order import CHUNK_CHARACTERS, MOST_CHARACTERS, by_prefix

DOCUMENTS = [letter * (3 * CHUNK_CHARACTERS) for letter in "cab"]


def test_questions_about_one_document_follow_each_other_in_their_order() -> None:
    prompts = [f"{DOCUMENTS[number % 3]} question {number}" for number in range(9)]
    assert by_prefix(prompts) == [1, 4, 7, 2, 5, 8, 0, 3, 6]


def test_prompts_that_have_nothing_to_gain_stay_as_they_are() -> None:
    instructions = "i" * (5 * CHUNK_CHARACTERS)
    assert by_prefix([f"{instructions} {text}" for text in "hgfedcba"]) == list(range(8))
    # Equal for less than a few KV blocks.
    assert by_prefix(["b" * 200, "a" * 200, "b" * 200]) == [0, 1, 2]
    # Side by side already.
    assert by_prefix([DOCUMENTS[0]] * 3 + [DOCUMENTS[1]] * 3) == list(range(6))
    assert by_prefix([]) == []


def test_what_is_far_behind_the_beginning_is_not_looked_at() -> None:
    long = "x" * MOST_CHARACTERS
    assert by_prefix([f"{long}b", f"{DOCUMENTS[0]}", f"{long}a"]) == [1, 0, 2]


@given(prompts=st.lists(st.sampled_from(DOCUMENTS) | st.text(max_size=600), max_size=30))
def test_it_is_an_order_of_all_of_them(prompts: list[str]) -> None:
    assert sorted(by_prefix(prompts)) == list(range(len(prompts)))
