"""Which replica holds which KV blocks, by what replicas say: names in, by replica how much of a prompt is cached out.

A replica is a row of buckets of 16 places. A block may be in either of two buckets, whichever has more room when it
comes, so that buckets fill evenly and no place is far; what is kept of its name is 32 bits. So a place costs 4 bytes,
and one of 10**8 blocks that are not there seems to be: that may cost a choice of a replica that is not the best one,
and nothing else. The few that find both buckets full are kept as they are, beside the table.

Blocks come and go a few at a time, so that is plain Python. A prompt is looked for in all replicas at once: a block is
in the same two buckets of each, and these lie side by side. vLLM drops a prefix from its end, so where it ends in one
replica is found by bisection; and most others end where that one does, as at the end of a system prompt. No lock:
whoever owns it is one thread.
``bench/route_cost.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hycluster.engine.block_changes import BlockChanges, Names

_PLACES = 16
# So many replicas are looked through one by one, each for all others that end where it does; what is left then, where
# all end elsewhere, is bisected together.
_MOST_GUESSES = 8
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
        self._counts = np.zeros(1, np.intp)
        # The same, flat.
        self._places = self._table.reshape(-1).data
        # By row, those that found no place.
        self._beside: dict[int, set[int]] = {}

    @property
    def replica_ids(self) -> Sequence[str]:
        """In the order of :meth:`cached_blocks`."""
        return list(self._rows)

    @property
    def blocks(self) -> int:
        """Over all replicas; one that several hold counts for each."""
        return int(self._counts.sum())

    @property
    def nbytes(self) -> int:
        """What the table takes, at most: pages that were never written are not there."""
        return self._table.nbytes

    @property
    def beside(self) -> int:
        """Blocks that found no place in the table."""
        return sum(map(len, self._beside.values()))

    @property
    def counts(self) -> NDArray[np.intp]:
        """By row, how many blocks its replica holds."""
        return self._counts

    def row(self, replica_id: str) -> int:
        """The one that a replica has until it is forgotten or says again all that it holds; -1 if it has none."""
        return self._rows.get(replica_id, -1)

    def held_by(self, replica_id: str) -> int:
        """How many blocks it holds."""
        row = self.row(replica_id)
        return int(self._counts[row]) if row >= 0 else 0

    def take(self, replica_id: str, changes: BlockChanges) -> None:
        """What a replica said of its blocks."""
        if changes.whole:
            self.forget(replica_id)
        if (row := self._rows.get(replica_id)) is None:
            row = self._join(replica_id)
        stored = sum([self._store(row, name) for name in changes.stored.tolist()])
        dropped = sum([self._drop(row, name) for name in changes.dropped.tolist()])
        self._counts[row] += stored - dropped

    def forget(self, replica_id: str) -> None:
        """A replica that is gone, or has lost what it had."""
        if (row := self._rows.pop(replica_id, None)) is None:
            return
        self._order = np.array(list(self._rows.values()), np.intp)
        self._table[:, row] = 0
        self._beside.pop(row, None)
        self._counts[row] = 0
        self._free.append(row)

    def held_somewhere(self, name: int) -> bool:
        """Whether any replica holds this block."""
        return bool(self._holding(name).any())

    def cached_blocks(self, names: Names) -> NDArray[np.intp]:
        """By replica, how many of a prompt's blocks it holds, from the first; in the order of :attr:`replica_ids`."""
        return self.cached_by_row(names)[self._order]

    def cached_by_row(self, names: Names) -> NDArray[np.intp]:
        """The same by row; 0 where no replica is."""
        found = np.zeros(self._table.shape[1], np.intp)
        if not len(names) or not self._rows:
            return found
        (rows,) = np.nonzero(self._holding(int(names[0])))
        low, high = np.ones(len(rows), np.intp), np.full(len(rows), len(names), np.intp)
        for _ in range(_MOST_GUESSES):
            if not len(rows):
                break
            end = self._end(int(rows[0]), names, int(low[0]), int(high[0]))
            there = self._holding(int(names[end - 1]))[rows]
            low, high = np.where(there, np.maximum(low, end), low), np.where(there, high, np.minimum(high, end - 1))
            if end < len(names):
                more = self._holding(int(names[end]))[rows]
                low = np.where(more, np.maximum(low, end + 1), low)
                high = np.where(more, high, np.minimum(high, end))
            found[rows] = low
            (open_,) = np.nonzero(low < high)
            rows, low, high = rows[open_], low[open_], high[open_]
        while len(rows):
            middle = (low + high + 1) // 2
            there = self._held(rows, names[middle - 1])
            low, high = np.where(there, middle, low), np.where(there, high, middle - 1)
            found[rows] = low
            (open_,) = np.nonzero(low < high)
            rows, low, high = rows[open_], low[open_], high[open_]
        return found

    def _holding(self, name: int) -> NDArray[np.bool_]:
        """By row, whether it has this block."""
        first, second, mark = self._buckets_of(name)
        there = (self._table[first] == mark).view(np.uint64) | (self._table[second] == mark).view(np.uint64)
        held: NDArray[np.bool_] = (there[:, 0] | there[:, 1]) != 0
        for row, beside in self._beside.items():
            held[row] |= name in beside
        return held

    def _end(self, row: int, names: Names, low: int, high: int) -> int:
        """How many of these, from the first, are in one row; between two bounds."""
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._has(row, int(names[middle - 1])) else (low, middle - 1)
        return low

    def _has(self, row: int, name: int) -> bool:
        one, two, mark = self._places_of(row, name)
        places = self._places
        if mark in places[one : one + _PLACES].tolist() or mark in places[two : two + _PLACES].tolist():
            return True
        return name in self._beside.get(row, ())

    def _held(self, rows: NDArray[np.intp], names: Names) -> NDArray[np.bool_]:
        """Of each row, whether it has the name beside it."""
        low, marks = names & np.uint64(_LOW), np.maximum((names >> np.uint64(_HIGH)).astype(np.uint32), np.uint32(1))
        second = low * np.uint64(_MIX) >> np.uint64(_SHIFT)
        buckets = (np.stack((low, second), axis=1) % np.uint64(self._buckets)).astype(np.intp)
        held: NDArray[np.bool_] = (self._table[buckets, rows[:, None]] == marks[:, None, None]).any(axis=(1, 2))
        if self._beside:
            for at in np.flatnonzero(~held).tolist():
                held[at] = int(names[at]) in self._beside.get(int(rows[at]), ())
        return held

    def _buckets_of(self, name: int) -> tuple[int, int, int]:
        """A block's two, and what marks it there; 0 is an empty place."""
        low = name & _LOW
        return low % self._buckets, ((low * _MIX & _ALL) >> _SHIFT) % self._buckets, name >> _HIGH or 1

    def _places_of(self, row: int, name: int) -> tuple[int, int, int]:
        """Where a row's two buckets begin, and the mark."""
        first, second, mark = self._buckets_of(name)
        rows = self._table.shape[1]
        return _PLACES * (first * rows + row), _PLACES * (second * rows + row), mark

    def _store(self, row: int, name: int) -> bool:
        """Whether it is new."""
        one, two, mark = self._places_of(row, name)
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
        one, two, mark = self._places_of(row, name)
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
            rows = self._table.shape[1]
            grown = self._new(2 * rows)
            grown[:, :rows] = self._table
            self._table = grown
            self._counts = np.pad(self._counts, (0, rows))
            self._places = grown.reshape(-1).data
        self._rows[replica_id] = row = self._free.pop()
        self._order = np.array(list(self._rows.values()), np.intp)
        return row

    def _new(self, rows: int) -> NDArray[np.uint32]:
        self._free = list(range(rows - 1, len(self._rows) - 1, -1))
        return np.zeros((self._buckets, rows, _PLACES), np.uint32)
