"""Which replica holds which KV blocks, by what replicas say: names in, by replica how much of a prompt is cached out.

One row of a table for each replica, of buckets of 16 places. A block may be in either of two buckets, whichever has
more room when it comes, so that buckets fill evenly and no place is far; what is kept of its name is 32 bits. So a
place costs 4 bytes, and one of 10**8 blocks that are not there seems to be: that may cost a choice of a replica that is
not the best one, and nothing else. The few that find both buckets full are kept as they are, beside the table.

Blocks come and go a few at a time, so that is plain Python. A prompt is looked for in all replicas at once, in columns:
vLLM drops a prefix from its end, so where it ends is found by bisection, in several points at once. No lock: whoever
owns it is one thread.
``bench/route_cost.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hycluster.engine.block_changes import BlockChanges, Names

_PLACES = 16
# Looked at in one go: places of blocks over all replicas, about, and of one prompt in one replica, at most.
_PROBES, _MOST_POINTS = 256, 32
# So full are buckets when a replica holds as many blocks as it can: beyond, a block may find both of its own full.
_FILL = 0.78
_LOW, _HIGH, _ALL = (1 << 32) - 1, 32, (1 << 64) - 1
_MIX, _SHIFT = 0x9E3779B97F4A7C15, 29


class BlockIndex:
    """Blocks of the replicas of a pool.

    Args:
        blocks: most that a replica holds; more cost time and memory.
    """

    def __init__(self, blocks: int) -> None:
        self._buckets = max(1, round(blocks / _PLACES / _FILL))
        self._rows: dict[str, int] = {}
        self._order = np.empty(0, np.intp)
        self._free: list[int] = []
        self._table = self._new(1)
        # The same, flat.
        self._places = self._table.reshape(-1).data
        # By replica, how many it holds; by row, those that found no place.
        self._counts: dict[str, int] = {}
        self._beside: dict[int, set[int]] = {}

    @property
    def replica_ids(self) -> Sequence[str]:
        """In the order of :meth:`cached_blocks`."""
        return list(self._rows)

    @property
    def blocks(self) -> int:
        """Over all replicas; one that several hold counts for each."""
        return sum(self._counts.values())

    @property
    def nbytes(self) -> int:
        """What the table takes, at most: pages that were never written are not there."""
        return self._table.nbytes

    @property
    def beside(self) -> int:
        """Blocks that found no place in the table."""
        return sum(map(len, self._beside.values()))

    def held_by(self, replica_id: str) -> int:
        """How many blocks it holds."""
        return self._counts.get(replica_id, 0)

    def take(self, replica_id: str, changes: BlockChanges) -> None:
        """What a replica said of its blocks."""
        if changes.whole:
            self.forget(replica_id)
        if (row := self._rows.get(replica_id)) is None:
            row = self._join(replica_id)
        stored = sum([self._store(row, name) for name in changes.stored.tolist()])
        dropped = sum([self._drop(row, name) for name in changes.dropped.tolist()])
        self._counts[replica_id] += stored - dropped

    def forget(self, replica_id: str) -> None:
        """A replica that is gone, or has lost what it had."""
        if (row := self._rows.pop(replica_id, None)) is None:
            return
        self._order = np.array(list(self._rows.values()), np.intp)
        self._table[row] = 0
        self._beside.pop(row, None)
        del self._counts[replica_id]
        self._free.append(row)

    def cached_blocks(self, names: Names) -> NDArray[np.intp]:
        """By replica, how many of a prompt's blocks it holds, from the first; in the order of :attr:`replica_ids`."""
        found = np.zeros(len(self._rows), np.intp)
        if not len(names) or not len(found):
            return found
        # Most hold nothing of it: those need no more.
        (some,) = np.nonzero(self._held(self._order, np.full(len(found), names[0])))
        low, high = np.ones(len(some), np.intp), np.full(len(some), len(names), np.intp)
        # The fewer there are, the more points of each are looked at in one go.
        points = min(_MOST_POINTS, max(1, _PROBES // max(1, len(some))))
        shares = np.arange(1, points + 1) / (points + 1)
        row = np.arange(len(some))
        while (low < high).any():
            at = low[:, None] + np.ceil((high - low)[:, None] * shares).astype(np.intp)
            held = self._held(np.repeat(self._order[some], points), names[at - 1].ravel()).reshape(at.shape).sum(axis=1)
            low, high = (
                np.where(held > 0, at[row, held - 1], low),
                np.where(held < points, at[row, np.minimum(held, points - 1)] - 1, high),
            )
        found[some] = low
        return found

    def _held(self, rows: NDArray[np.intp], names: Names) -> NDArray[np.bool_]:
        """Of each row, whether it has the name beside it."""
        low, marks = names & np.uint64(_LOW), np.maximum((names >> np.uint64(_HIGH)).astype(np.uint32), np.uint32(1))
        second = low * np.uint64(_MIX) >> np.uint64(_SHIFT)
        buckets = (np.stack((low, second), axis=1) % np.uint64(self._buckets)).astype(np.intp)
        held: NDArray[np.bool_] = (self._table[rows[:, None], buckets] == marks[:, None, None]).any(axis=(1, 2))
        if self._beside:
            for at in np.flatnonzero(~held).tolist():
                held[at] = int(names[at]) in self._beside.get(int(rows[at]), ())
        return held

    def _buckets_of(self, row: int, name: int) -> tuple[int, int, int]:
        """Where both of a block's begin, and what marks it there; 0 is an empty place."""
        low, begin = name & _LOW, row * self._buckets
        first, second = low % self._buckets, (low * _MIX & _ALL) >> _SHIFT
        return _PLACES * (begin + first), _PLACES * (begin + second % self._buckets), name >> _HIGH or 1

    def _store(self, row: int, name: int) -> bool:
        """Whether it is new."""
        one, two, mark = self._buckets_of(row, name)
        places = self._places
        first, second = places[one : one + _PLACES].tolist(), places[two : two + _PLACES].tolist()
        if mark in first or mark in second:
            return False
        if second.count(0) > first.count(0):
            one, first = two, second
        if 0 in first:
            places[one + first.index(0)] = mark
        elif name in (beside := self._beside.setdefault(row, set())):
            return False
        else:
            beside.add(name)
        return True

    def _drop(self, row: int, name: int) -> bool:
        """Whether it was there."""
        one, two, mark = self._buckets_of(row, name)
        for begin in (one, two):
            bucket = self._places[begin : begin + _PLACES].tolist()
            if mark in bucket:
                self._places[begin + bucket.index(mark)] = 0
                return True
        beside = self._beside.get(row, set())
        if name not in beside:
            return False
        beside.remove(name)
        if not beside:
            del self._beside[row]
        return True

    def _join(self, replica_id: str) -> int:
        if not self._free:
            grown = self._new(2 * len(self._table))
            grown[: len(self._table)] = self._table
            self._table = grown
            self._places = grown.reshape(-1).data
        self._rows[replica_id] = row = self._free.pop()
        self._counts[replica_id] = 0
        self._order = np.array(list(self._rows.values()), np.intp)
        return row

    def _new(self, rows: int) -> NDArray[np.uint32]:
        self._free = list(range(rows - 1, len(self._rows) - 1, -1))
        return np.zeros((rows, self._buckets, _PLACES), np.uint32)
