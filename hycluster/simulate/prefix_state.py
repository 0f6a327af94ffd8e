"""What a router knows of the blocks that replicas hold: what they say they stored and dropped, and what it sent them.

In the simulation, for either fidelity; blocks are named by a trace's ids or by vLLM's hashes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from hycluster.gateway.prefix_router import Column


class PrefixState:
    """By block, which replicas hold it."""

    def __init__(self, replicas: int) -> None:
        self._everywhere = (1 << replicas) - 1
        # A bit for each replica.
        self._holders: dict[int, int] = {}
        # By replica, when it was last sent what begins with a block, longest ago first.
        self._used_s: list[OrderedDict[int, float]] = [OrderedDict() for _ in range(replicas)]
        self._drops = [False] * replicas
        # When what a replica would drop next was last of use; minus infinity as long as it has dropped nothing.
        self._oldest_s: Column = np.full(replicas, -math.inf)

    def evicts_age_s(self, now_s: float) -> Column:
        """By replica, how long what it would drop next has not been used; infinite before it has dropped any."""
        return now_s - self._oldest_s

    def cached_blocks(self, blocks: Sequence[int]) -> Column:
        """By replica, how many of these it holds, from the first."""
        found = np.zeros(len(self._used_s))
        alive = self._everywhere
        for depth, block in enumerate(blocks):
            holds = alive & self._holders.get(block, 0)
            for replica in _bits(alive ^ holds):
                found[replica] = depth
            alive = holds
            if not alive:
                return found
        for replica in _bits(alive):
            found[replica] = len(blocks)
        return found

    def sent(self, replica: int, blocks: Sequence[int], now_s: float) -> None:
        """A replica that gets a prompt is going to hold its blocks, so what comes at once after it counts on them."""
        bit, used_s = 1 << replica, self._used_s[replica]
        for block in reversed(blocks):
            self._holders[block] = self._holders.get(block, 0) | bit
            used_s[block] = now_s
            used_s.move_to_end(block)
        self._note_oldest(replica)

    def stored(self, replica: int, block: int, now_s: float) -> None:
        self._holders[block] = self._holders.get(block, 0) | 1 << replica
        self._used_s[replica].setdefault(block, now_s)

    def dropped(self, replica: int, block: int) -> None:
        if self._used_s[replica].pop(block, None) is None:
            return
        self._drops[replica] = True
        self._note_oldest(replica)
        if left := self._holders[block] & ~(1 << replica):
            self._holders[block] = left
        else:
            del self._holders[block]

    def _note_oldest(self, replica: int) -> None:
        used_s = self._used_s[replica]
        if self._drops[replica] and used_s:
            self._oldest_s[replica] = used_s[next(iter(used_s))]


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
