"""Which replicas hold which KV blocks, as they said. Pure. Blocks go by their names (``engine/block_changes.py``).

Replicas have small numbers here, so that those that hold a block are the bits of one number: a lookup is a dictionary's
for each block, however many replicas there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hycluster.engine.block_changes import BlockChanges


class HeldBlocks:
    """By block, which replicas hold it."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._replicas: dict[str, int] = {}
        self._blocks: dict[str, int] = {}

    @property
    def blocks(self) -> int:
        """Over all replicas; one that several hold counts for each."""
        return sum(self._blocks.values())

    def take(self, replica_id: str, changes: BlockChanges) -> None:
        """What a replica said of its blocks."""
        if changes.whole:
            self.forget(replica_id)
        bit = 1 << self._number(replica_id)
        holders = self._holders
        for name in changes.stored.tolist():
            holders[name] = holders.get(name, 0) | bit
        self._drop(changes.dropped.tolist(), bit)
        self._blocks[replica_id] = self._blocks.get(replica_id, 0) + len(changes.stored) - len(changes.dropped)

    def forget(self, replica_id: str) -> None:
        """A replica that is gone, or has lost what it had."""
        if (number := self._replicas.pop(replica_id, None)) is None:
            return
        bit = 1 << number
        if self._blocks.pop(replica_id, 0):
            self._drop([name for name, holders in self._holders.items() if holders & bit], bit)

    def holds(self, replica_id: str, name: int) -> bool:
        number = self._replicas.get(replica_id)
        return number is not None and bool(self._holders.get(name, 0) >> number & 1)

    def matched(self, names: Sequence[int]) -> dict[str, int]:
        """By replica, how many of these blocks it holds, from the first; replicas that hold none are left out."""
        found: dict[int, int] = {}
        alive, count = -1, 0
        for count, name in enumerate(names):
            holders = alive & self._holders.get(name, 0)
            if holders != alive:
                if count:
                    found |= dict.fromkeys(_bits(alive & ~holders), count)
                alive = holders
                if not alive:
                    break
        else:
            if names:
                found |= dict.fromkeys(_bits(alive), count + 1)
        return {replica_id: found[number] for replica_id, number in self._replicas.items() if number in found}

    def _number(self, replica_id: str) -> int:
        if replica_id not in self._replicas:
            taken = set(self._replicas.values())
            self._replicas[replica_id] = next(number for number in range(len(taken) + 1) if number not in taken)
        return self._replicas[replica_id]

    def _drop(self, names: Iterable[int], bit: int) -> None:
        holders = self._holders
        for name in names:
            if left := holders.get(name, 0) & ~bit:
                holders[name] = left
            else:
                holders.pop(name, None)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
