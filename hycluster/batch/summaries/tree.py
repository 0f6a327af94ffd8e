"""The shape of a tree of summaries: what each call has room for, what is merged with what, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hycluster.batch.job import Summary
from hycluster.errors import SettingsError

# Kept free for the summary where the job does not say how long it may be.
DEFAULT_SUMMARY_TOKENS = 1024
# Summaries of parts are so short that at least this many fit into a prompt.
FEWEST_MERGED = 4
# Tokens of a separator, and of what a cut between two texts may add; generously.
SEAM_TOKENS = 4
# Below this a part is less than a sentence or two.
FEWEST_PART_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens of one model's calls.

    Attributes:
        whole: most of a text that is asked in one piece.
        part: most of a part, its overlap included.
        merge: most of the summaries in one prompt, separators included.
        summary: most of a summary that is not the last.
    """

    whole: int
    part: int
    merge: int
    summary: int


@dataclass(frozen=True, slots=True)
class Node:
    """One call: a part's summary, or a summary of summaries.

    Attributes:
        level: 0 for parts; else the round of merging, from 1.
        index: place among the nodes of its level.
        start, end: the characters of the text that it tells of, overlaps aside.
        context_start: parts only: where the overlap with the part before begins.
        children: what it was made of, as places in ``Tree.nodes``; none for parts.
    """

    level: int
    index: int
    start: int
    end: int
    context_start: int | None
    children: tuple[int, ...]
    summary: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Tree:
    """All calls for one text, level by level; the last node is the summary of all of it."""

    nodes: tuple[Node, ...]

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    @property
    def prompt_tokens(self) -> int:
        return sum(node.prompt_tokens for node in self.nodes)

    @property
    def completion_tokens(self) -> int:
        return sum(node.completion_tokens for node in self.nodes)

    def to_dict(self) -> dict[str, Any]:
        return {"nodes": [asdict(node) for node in self.nodes]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


def budget(
    context_tokens: int, max_tokens: int | None, settings: Summary, *, whole: int, part: int, merge: int
) -> Budget:
    """Share a context of so many tokens.

    Args:
        max_tokens: of the last summary, as the job asks.
        whole, part, merge: tokens of each kind of prompt without its text.

    Raises:
        SettingsError: the context is too small, parts are to be larger than it leaves, or overlaps than half a part.
    """
    # An answer that may be longer than that gets what its own prompt leaves.
    answer = min(max_tokens or min(DEFAULT_SUMMARY_TOKENS, context_tokens // 4), context_tokens // 2)
    room = context_tokens - answer - merge
    summary = min(answer, room // FEWEST_MERGED - SEAM_TOKENS)
    largest = context_tokens - max(answer, summary) - part - SEAM_TOKENS
    if summary < 1 or largest < FEWEST_PART_TOKENS:
        raise SettingsError(
            f"model: a context of {context_tokens} tokens is too small to summarize a text that does not fit into it"
        )
    size = settings.part_tokens or largest
    for name, value, most in (
        ("part_tokens", size, largest),
        ("overlap_tokens", settings.overlap_tokens, size // 2),
    ):
        if value > most:
            raise SettingsError(
                f"summary.{name}: {value} is not allowed; must be at most {most} in a context of {context_tokens}"
            )
    return Budget(context_tokens - answer - whole - SEAM_TOKENS, size, room, summary)


def plan_merges(tokens: Sequence[int], room: int) -> list[range]:
    """Runs of neighbours that are merged into one, each of at most ``room`` tokens, as even as can be.

    A run of one is left as it is. There are as many runs as ``tokens`` where no two neighbours fit together.
    """
    runs = _runs(tokens, room, room)
    even = _runs(tokens, room, -(-sum(tokens) // len(runs))) if runs else runs
    return even if len(even) == len(runs) else runs


def _runs(tokens: Sequence[int], room: int, enough: int) -> list[range]:
    """Runs that end as soon as they have ``enough`` tokens, or the next would be more than ``room``."""
    runs, first, held = [], 0, 0
    for place, more in enumerate(tokens):
        if place > first and (held >= enough or held + more > room):
            runs.append(range(first, place))
            first, held = place, 0
        held += more
    return [*runs, range(first, len(tokens))] if tokens else []
