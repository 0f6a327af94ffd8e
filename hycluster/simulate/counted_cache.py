"""A prefix cache by its counts: which blocks of prompts an engine holds, without what is in them.

It does what vLLM's block pool does (0.32.0), with a block of 512 tokens of a trace as one piece: what a request holds
stays, what nobody holds goes in the order in which it was let go, the end of a prefix before its beginning. Outputs
and the tails of prompts take room too, but nothing finds them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from hycluster.simulate.traces import HASH_TOKENS


class CountedCache:
    """Blocks of one engine.

    Args:
        capacity_tokens: what it holds.
        stored, dropped: told of each block that comes or goes.
    """

    def __init__(self, capacity_tokens: int, stored: Callable[[int], None], dropped: Callable[[int], None]) -> None:
        self._stored, self._dropped = stored, dropped
        # Tokens that neither a request nor a block has.
        self._blank = capacity_tokens
        # By block, how many requests hold it.
        self._held: dict[int, int] = {}
        # What nobody holds, by name with its tokens, longest ago first; what nothing finds again has negative names.
        self._idle: OrderedDict[int, int] = OrderedDict()
        self._idle_tokens = self._names = 0

    @property
    def free_tokens(self) -> int:
        """What a request could get, if all that nobody holds went."""
        return self._blank + self._idle_tokens

    def matched(self, blocks: Sequence[int]) -> int:
        """How many of these, from the first, it has."""
        for number, block in enumerate(blocks):
            if block not in self._held and block not in self._idle:
                return number
        return len(blocks)

    def take(self, blocks: Sequence[int], more_tokens: int) -> int | None:
        """Have a request hold these blocks, and so many tokens that have no name.

        Returns:
            How many of the blocks, from the first, were there; None if there is no room, and nothing was done.
        """
        matched = self.matched(blocks)
        # What is there behind a gap is used as well: it would be the same block twice.
        there = sum(block in self._idle or block in self._held for block in blocks)
        idle = sum(block in self._idle for block in blocks)
        needed = (len(blocks) - there) * HASH_TOKENS + more_tokens
        if needed > self.free_tokens - idle * HASH_TOKENS:
            return None
        for block in blocks:
            if self._idle.pop(block, None) is not None:
                self._idle_tokens -= HASH_TOKENS
                self._held[block] = 1
            elif block in self._held:
                self._held[block] += 1
        while self._blank < needed:
            self._evict()
        self._blank -= needed
        for block in blocks[matched:]:
            if block not in self._held:
                self._held[block] = 1
                self._stored(block)
        return matched

    def let_go(self, blocks: Sequence[int], more_tokens: int) -> None:
        """A request is over."""
        if more_tokens:
            self._names -= 1
            self._idle[self._names] = more_tokens
            self._idle_tokens += more_tokens
        for block in reversed(blocks):
            if self._held[block] > 1:
                self._held[block] -= 1
            else:
                del self._held[block]
                self._idle[block] = HASH_TOKENS
                self._idle_tokens += HASH_TOKENS

    def _evict(self) -> None:
        block, tokens = self._idle.popitem(last=False)
        self._idle_tokens -= tokens
        self._blank += tokens
        if block >= 0:
            self._dropped(block)
