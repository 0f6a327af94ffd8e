from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.batch.summaries.splitter import CountTokens, Part, split_text
from hycluster.errors import InvalidInput


def characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


def utf8(texts: Sequence[str]) -> list[int]:
    return [len(text.encode()) for text in texts]


def words(texts: Sequence[str]) -> list[int]:
    """Fewer for the whole than for its pieces where a word was cut."""
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def more_than_its_pieces(texts: Sequence[str]) -> list[int]:
    """More for the whole than for its pieces, as tokenizers may do at seams."""
    return [len(text) + len(text) // 5 for text in texts]


COUNTERS = [characters, utf8, words, more_than_its_pieces]
PROSE = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            "Z",
            " ",
            " ",
            "\n",
            ". ",
            "! ",
            "# ",
            "\n\n",
            "。",
            "，",
            "汉",
            "字",
            "👨\u200d👩\u200d👧",
            "e\u0301",
        ]
    )
).map("".join)
TEXTS = st.one_of(st.text(), PROSE, st.lists(PROSE).map("\n\n".join))


def covers(text: str, parts: list[Part]) -> None:
    assert "".join(text[part.start : part.end] for part in parts) == text
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert all(part.start < part.end for part in parts)


@given(text=TEXTS, count=st.sampled_from(COUNTERS), max_tokens=st.integers(8, 40), share=st.floats(0, 0.5))
def test_every_character_is_in_one_part_and_no_part_is_too_large(
    text: str, count: CountTokens, max_tokens: int, share: float
) -> None:
    overlap_tokens = int(max_tokens * share)
    parts = split_text(text, count, max_tokens, overlap_tokens)
    covers(text, parts)
    for part in parts:
        assert part.tokens == count([text[part.context_start : part.end]])[0] <= max_tokens
        assert 0 <= part.context_start <= part.start
        assert count([text[part.context_start : part.start]])[0] <= overlap_tokens * 1.25
    assert split_text(text, count, max_tokens, overlap_tokens) == parts


@given(text=TEXTS, max_tokens=st.integers(8, 40))
def test_parts_are_not_small_without_need(text: str, max_tokens: int) -> None:
    parts = split_text(text, characters, max_tokens)
    assert all(a.tokens + b.tokens > max_tokens // 2 for a, b in pairwise(parts))


def test_a_text_that_fits_is_one_part() -> None:
    assert split_text("One. Two.\n\nThree.", characters, 17) == [Part(0, 17, 0, 17)]
    assert split_text("", characters, 8) == []


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Alpha beta. Gamma.\n\nDelta.\n# Head\nmore text here", "Alpha beta. Gamma.\n\nDelta.\n"),
        ("Alpha beta.\n\nGamma.\nDelta epsilon. Zeta eta theta", "Alpha beta.\n\nGamma.\n"),
        ("Alpha beta gamma.\n\nDelta. Epsilon zeta eta theta", "Alpha beta gamma.\n\n"),
        ("One two three. Four five six seven eight nine ten", "One two three. "),
        (
            "第一句话说完了。第二句话接着往下说也说完了。第三句话还没有说完就到了尽头",
            "第一句话说完了。第二句话接着往下说也说完了。",
        ),
        (
            "正文内容在这里结束了，这是第一章。\n第二章 开始\n后面还有很多很多的内容要讲述出来",
            "正文内容在这里结束了，这是第一章。\n",
        ),
        ("He said “Go!” Then he left. And nobody knew where to", "He said “Go!” Then he left. "),
    ],
)
def test_cuts_are_at_the_best_boundary(text: str, first: str) -> None:
    parts = split_text(text, characters, 30)
    covers(text, parts)
    assert text[: parts[0].end] == first


@pytest.mark.parametrize("cluster", ["👨\u200d👩\u200d👧", "🇩🇪", "e\u0301\u0323", "👍🏽", "각"])
def test_what_is_drawn_as_one_character_stays_whole(cluster: str) -> None:
    text = cluster * 50
    for max_tokens in range(32, 64):
        assert all(part.end % len(cluster) == 0 for part in split_text(text, characters, max_tokens))


def test_a_pile_of_accents_is_cut_all_the_same() -> None:
    text = "e" + "\u0301" * 1000
    parts = split_text(text, characters, 16)
    covers(text, parts)
    assert max(part.tokens for part in parts) <= 16


def test_the_overlap_is_the_end_of_the_part_before() -> None:
    text = " ".join(f"Sentence number {n:02d} ends." for n in range(20))
    parts = split_text(text, words, 30, 12)
    assert len(parts) > 2
    for before, part in pairwise(parts):
        assert before.start < part.context_start < part.start
        assert text[part.context_start :].startswith("Sentence number")
    long = "word " * 100
    assert all(0 < p.start - p.context_start <= 50 for p in split_text(long, words, 30, 10)[1:])


@pytest.mark.parametrize(
    ("max_tokens", "overlap_tokens", "said"),
    [
        (10, 6, "overlap_tokens: 6 is not allowed; must be from 0 to half of a part's 10 tokens"),
        (2, 0, "part_tokens: 2 is not allowed; the character at 1 alone has 3"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(max_tokens: int, overlap_tokens: int, said: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(said)}"):
        split_text("a汉", utf8, max_tokens, overlap_tokens)


HARD = {
    "letters": "a",
    "spaces": " ",
    "dots": ".",
    "newlines": "\n",
    "full stops": "。",
    "short sentences": "a. ",
    "headings": "# a\n",
    "quotes": '.") ',
    "accents": "\u0301",
    "families": "👨\u200d👩\u200d👧",
}


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD.keys())
def test_work_is_linear_on_hard_texts(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    seen = Seen(utf8)
    covers(text, split_text(text, seen, 1500))
    assert seen.characters <= 2.1 * len(text)


class Seen:
    """Counts the characters that it is asked to count, and the largest call."""

    def __init__(self, count: CountTokens) -> None:
        self.count = count
        self.characters = 0

    def __call__(self, texts: Sequence[str]) -> Sequence[int]:
        self.characters += sum(map(len, texts))
        return self.count(texts)


def book(characters: int) -> str:
    """A made-up book in English and Chinese."""
    chance = random.Random(4)
    lines: list[str] = []
    length = 0
    while length < characters:
        if chance.random() < 0.01:
            line = f"# Chapter {len(lines)}\n"
        elif chance.random() < 0.5:
            line = " ".join("abcdefghij"[: chance.randint(1, 10)] for _ in range(chance.randint(4, 30))) + ". "
        else:
            line = "长江黄河山水人家"[: chance.randint(2, 8)] * chance.randint(1, 5) + "。"
        if chance.random() < 0.1:
            line += "\n\n"
        lines.append(line)
        length += len(line)
    return "".join(lines)[:characters]


@pytest.mark.slow
def test_ten_million_characters(capsys: pytest.CaptureFixture[str]) -> None:
    text = book(10_000_000)
    seen = Seen(words)
    begun_s = time.monotonic()
    parts = split_text(text, seen, 1500, 100)
    seconds = time.monotonic() - begun_s
    covers(text, parts)
    assert max(part.tokens for part in parts) <= 1500
    assert seen.characters <= 2.5 * len(text)
    with capsys.disabled():
        print(f"\n10,000,000 characters: {len(parts)} parts of at most 1500 tokens in {seconds:.1f} s")
