"""In which order rows are asked: those whose prompts begin alike one after the other.

The engines keep the KV blocks of what they computed last. Rows about one document that lie far apart in the input find
their common beginning gone, and it is computed again. What is written is not touched by this order. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

# What counts as an equal beginning, in characters: some KV blocks. Beyond the last of so many nothing is looked at.
CHUNK_CHARACTERS = 256
MOST_CHARACTERS = 64 * CHUNK_CHARACTERS


def by_prefix(prompts: Sequence[str]) -> list[int]:
    """The places of prompts in the order in which to ask them.

    It is the order that they have, unless another one puts more equal beginnings side by side: what follows the input
    finishes its shards one by one.
    """
    kept = [prompt[:MOST_CHARACTERS] for prompt in prompts]
    # By whole chunks only: what is alike but for its end stays in its order.
    begun = [prompt[: len(prompt) - len(prompt) % CHUNK_CHARACTERS] for prompt in kept]
    as_they_are = range(len(kept))
    sorted_ = sorted(as_they_are, key=begun.__getitem__)
    gain = _shared_chunks([begun[place] for place in sorted_]) - _shared_chunks(begun)
    return sorted_ if gain > 0 else list(as_they_are)


def _shared_chunks(prompts: Sequence[str]) -> int:
    """How many whole chunks each prompt begins with in common with the one before, all together."""
    return sum(_chunks_in_common(before, prompt) for before, prompt in pairwise(prompts))


def _chunks_in_common(one: str, other: str) -> int:
    chunks = min(len(one), len(other)) // CHUNK_CHARACTERS
    for chunk in range(chunks):
        begin = chunk * CHUNK_CHARACTERS
        if one[begin : begin + CHUNK_CHARACTERS] != other[begin : begin + CHUNK_CHARACTERS]:
            return chunk
    return chunks
