from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from hycluster.batch import ask
from hycluster.batch.job import Summary
from hycluster.batch.prompts import MERGE, PART
from hycluster.batch.summaries.summarizer import Summarizer
from hycluster.batch.summaries.tree import Tree
from hycluster.core import Generation, GenerationRequest, Output, Sampling
from hycluster.errors import InvalidInput, JobFailed, Unavailable
from tests.batch.stand_in import StandInGenerator


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "FIRST_BACKOFF_S", 0.001)


def summarizer(generator: Any, slots: int = 8, max_tokens: int | None = 40, **settings: Any) -> Summarizer:
    return Summarizer(
        generator,
        asyncio.Semaphore(slots),
        ask.Asker(retry_s=10),
        model="stand-in",
        sampling=Sampling(max_tokens=max_tokens, min_tokens=2),
        settings=Summary(**settings),
        whole=lambda text: [{"role": "user", "content": f"Summarize: {text}"}],
    )


def text_of(words: int, seed: int = 0) -> str:
    chance = random.Random(seed)
    ends = chance.choices([" ", ". ", ".\n\n"], [91, 8, 1], k=words)
    return "".join(f"w{n}{end}" for n, end in enumerate(ends))


def check_tree(text: str, tree: Tree) -> None:
    """Parts cover the text; every node but the last is the child of exactly one; spans are those of the children."""
    parts = [node for node in tree.nodes if node.level == 0]
    assert (parts[0].start, parts[-1].end) == (0, len(text))
    assert all(a.end == b.start for a, b in pairwise(parts))
    parents = Counter(child for node in tree.nodes for child in node.children)
    assert parents == dict.fromkeys(range(len(tree.nodes) - 1), 1)
    for place, node in enumerate(tree.nodes):
        assert (node.level == 0) == (not node.children)
        assert all(child < place for child in node.children)
        if node.children:
            assert (node.start, node.end) == (tree.nodes[node.children[0]].start, tree.nodes[node.children[-1]].end)
            assert all(tree.nodes[a].end == tree.nodes[b].start for a, b in pairwise(node.children))


class Watched(StandInGenerator):
    """Keeps the requests; fails the given ids once each."""

    def __init__(self, context_tokens: int = 200, fail: tuple[str, ...] = ()) -> None:
        super().__init__(context_tokens=context_tokens)
        self.asked: list[GenerationRequest] = []
        self.fail = set(fail)

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        self.asked.append(request)
        if request.request_id in self.fail:
            self.fail.remove(request.request_id)
            raise Unavailable("a replica was lost")
        return await super().generate(request)


async def test_a_long_text_becomes_one_summary() -> None:
    generator = Watched()
    text = text_of(3000)
    tree = await summarizer(generator).summarize(text, "doc")
    check_tree(text, tree)
    assert tree.root.level >= 2
    assert tree.nodes[0].summary
    for request in generator.asked:
        assert request.messages is not None
        assert request.sampling.max_tokens is not None
        prompt = len(await generator.tokenize("stand-in", messages=request.messages))
        assert prompt + request.sampling.max_tokens <= generator.context_tokens
    assert len({request.request_id for request in generator.asked}) == len(generator.asked) == len(tree.nodes)
    last = generator.asked[-1].sampling
    assert (last.max_tokens, last.min_tokens) == (40, 2)
    assert tree.prompt_tokens == sum(node.prompt_tokens for node in tree.nodes) > 3000
    assert tree.root.completion_tokens == 40


async def test_one_part_is_summarized_at_the_length_asked_for() -> None:
    generator = Watched()
    tree = await summarizer(generator).summarize("A short text.", "doc")
    assert [(node.level, node.start, node.end) for node in tree.nodes] == [(0, 0, 13)]
    assert generator.asked[0].sampling.max_tokens == 40


async def test_the_tree_as_json() -> None:
    text = text_of(600)
    tree = await summarizer(Watched(), overlap_tokens=10).summarize(text, "doc")
    nodes = json.loads(tree.to_json())["nodes"]
    assert nodes[-1]["summary"] == tree.root.summary
    assert nodes[1]["context_start"] < nodes[1]["start"] == nodes[0]["end"]
    assert set(nodes[0]) == {
        *("level", "index", "start", "end", "context_start", "children"),
        *("summary", "finish_reason", "prompt_tokens", "completion_tokens"),
    }


async def test_a_failed_part_is_asked_again_alone() -> None:
    generator = Watched(fail=("doc-0.3", "doc-1.0"))
    text = text_of(2000)
    tree = await summarizer(generator).summarize(text, "doc")
    check_tree(text, tree)
    asked = Counter(request.request_id for request in generator.asked)
    assert {name for name, times in asked.items() if times == 2} == {"doc-0.3", "doc-1.0"}
    assert max(asked.values()) == 2


async def test_many_documents_share_the_slots() -> None:
    generator = Watched()
    makes = summarizer(generator, slots=5)
    texts = [text_of(500 + 100 * n, seed=n) for n in range(12)]
    trees = await asyncio.gather(*(makes.summarize(text, f"doc{n}") for n, text in enumerate(texts)))
    for text, tree in zip(texts, trees, strict=True):
        check_tree(text, tree)
    assert generator.most_in_flight == 5
    first = [request.request_id.partition("-")[0] for request in generator.asked[:200] if request.request_id]
    assert len(set(first)) > 1


@pytest.mark.parametrize(("words", "fits"), [(10, True), (140, True), (200, False), (20_000, False)])
async def test_what_fits(words: int, fits: bool) -> None:
    assert await summarizer(Watched()).fits(text_of(words)) is fits


async def test_a_text_with_few_tokens_fits_however_many_characters_it_has() -> None:
    assert await summarizer(Watched()).fits("word" + " " * 100_000 + "word")


async def test_chinese_texts_are_asked_in_chinese() -> None:
    generator = Watched()
    text = "长江 很 长。黄河 也 很 长。" * 100
    check_tree(text, await summarizer(generator).summarize(text, "doc"))
    contents = [str(request.messages[0]["content"]) for request in generator.asked if request.messages]
    assert contents[0].startswith(PART["zh"][:10])
    assert contents[-1].startswith(MERGE["zh"][:10])


class Verbose(Watched):
    """Never keeps to ``max_tokens``."""

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        self.asked.append(request)
        return Generation("id", "stand-in", [Output(0, "word " * 500, [], "stop")])


class Refusing(Watched):
    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        raise InvalidInput("prompt: refused")


class Down(Watched):
    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        raise Unavailable("no engine")


@pytest.mark.parametrize(
    ("generator", "error", "said"),
    [
        (
            Verbose(),
            InvalidInput,
            "summaries do not get shorter: on level 1 no two of [0-9]+ fit into the [0-9]+ tokens",
        ),
        (Refusing(), InvalidInput, "^prompt: refused$"),
    ],
)
async def test_a_text_that_cannot_be_summarized(generator: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        await summarizer(generator).summarize(text_of(2000), "doc")


async def test_an_engine_that_stays_away_is_a_failed_job() -> None:
    makes = summarizer(Down())
    makes._asked = ask.Asker(retry_s=0)
    with pytest.raises(JobFailed, match=r"row doc-0\.0: no engine could serve it for 0 s"):
        await makes.summarize(text_of(2000), "doc")


@pytest.mark.slow
async def test_ten_million_characters(capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(1_400_000)[:10_000_000]
    assert len(text) == 10_000_000
    generator = Watched(context_tokens=8192)
    begun_s = time.monotonic()
    tree = await summarizer(generator, slots=256, max_tokens=256, overlap_tokens=64).summarize(text, "doc")
    seconds = time.monotonic() - begun_s
    check_tree(text, tree)
    parts = sum(node.level == 0 for node in tree.nodes)
    assert tree.root.level <= 3
    with capsys.disabled():
        print(
            f"\n10,000,000 characters: {parts} parts, {tree.root.level} merge levels, {seconds:.1f} s, stand-in engine"
        )
