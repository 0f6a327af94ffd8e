"""Which replica has which KV blocks: 64-bit block hashes in, by replica how much of a prompt is cached out.

One row of a table for each replica, of buckets of 16 places. A block may be in either of two buckets, whichever has
more room when it comes, so that buckets fill evenly and no place is far; what is kept of it is 32 bits. So a place
costs 4 bytes, and one of 10**8 blocks that are not there seems to be: that may cost a choice of a replica that is not
the best one, and nothing else. All replicas are asked at once, in columns.

A prefix's blocks go from its end, so where it ends is found by bisection, in several points at once. No lock: whoever
owns it is one thread.
``bench/route_cost.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_PLACES = 16
_AT_ONCE = 4
# Looked at in one go: places of blocks over all replicas, about, and of one prompt in one replica, at most.
_PROBES, _MOST_POINTS = 256, 32
# So full are buckets when a replica holds as many blocks as it can: beyond, a block may find both of its own full.
_FILL = 0.78
_LOW, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(32)
_MIX, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)


class BlockIndex:
    """Blocks of the replicas of a pool.

    Args:
        blocks: most that a replica holds.

    Attributes:
        left_out: blocks that found no place; from there on their prefixes seem not to be cached.
    """

    def __init__(self, blocks: int) -> None:
        self._buckets = np.uint64(max(1, round(blocks / _PLACES / _FILL)))
        self._rows: dict[str, int] = {}
        self._order = np.empty(0, np.intp)
        self._free: list[int] = []
        self._table = self._new(1)
        self.left_out = 0

    @property
    def replica_ids(self) -> Sequence[str]:
        """In the order of :meth:`cached_blocks`."""
        return list(self._rows)

    @property
    def nbytes(self) -> int:
        """What it takes, at most: pages that were never written are not there."""
        return self._table.nbytes

    def join(self, replica_id: str) -> None:
        """A replica that holds nothing; also one that is known, after it lost all."""
        if (row := self._rows.get(replica_id)) is not None:
            self._table[row] = 0
            return
        if not self._free:
            grown = self._new(2 * len(self._table))
            grown[: len(self._table)] = self._table
            self._table = grown
        self._rows[replica_id] = self._free.pop()
        self._order = np.array(list(self._rows.values()), np.intp)

    def leave(self, replica_id: str) -> None:
        """A replica that is no more."""
        row = self._rows.pop(replica_id)
        self._order = np.array(list(self._rows.values()), np.intp)
        self._table[row] = 0
        self._free.append(row)

    def store(self, replica_id: str, hashes: Hashes) -> None:
        """It holds these, some of them perhaps already."""
        table = self._table[self._rows[replica_id]]
        hashes = np.unique(hashes)
        places, marks = self._places(hashes)
        missing = ~(table[places] == marks[:, None, None]).any(axis=(1, 2))
        places, marks = places[missing], marks[missing]
        while len(marks):
            taken = (table[places] != 0).sum(axis=2)
            emptier = taken.argmin(axis=1)
            bucket = np.take_along_axis(places, emptier[:, None], 1)[:, 0]
            full = np.take_along_axis(taken, emptier[:, None], 1)[:, 0] == _PLACES
            self.left_out += int(full.sum())
            # A few for each bucket at a time: the next ones have to see them.
            order = np.argsort(bucket, kind="stable")
            rank = np.empty(len(order), np.intp)
            rank[order] = np.arange(len(order)) - np.searchsorted(bucket[order], bucket[order])
            now = ~full & (rank < np.minimum(_AT_ONCE, _PLACES - taken.min(axis=1)))
            empty = np.argsort(table[bucket[now]] != 0, axis=1, kind="stable")
            table[bucket[now], empty[np.arange(len(empty)), rank[now]]] = marks[now]
            full |= now
            places, marks = places[~full], marks[~full]

    def drop(self, replica_id: str, hashes: Hashes) -> None:
        """It does not hold these any more."""
        table = self._table[self._rows[replica_id]]
        places, marks = self._places(hashes)
        which, side, place = np.nonzero(table[places] == marks[:, None, None])
        table[places[which, side], place] = 0

    def held_by_any(self, block: int | np.uint64) -> bool:
        """Whether any replica holds it."""
        return bool(self._held(self._order, np.full(len(self._order), block, np.uint64)).any())

    def cached_blocks(self, hashes: Hashes) -> NDArray[np.intp]:
        """By replica, how many of a prompt's blocks it holds, from the first; in the order of :attr:`replica_ids`."""
        found = np.zeros(len(self._rows), np.intp)
        if not len(hashes) or not len(found):
            return found
        # Most hold nothing of it: those need no more.
        (some,) = np.nonzero(self._held(self._order, np.full(len(found), hashes[0])))
        low, high = np.ones(len(some), np.intp), np.full(len(some), len(hashes), np.intp)
        # The fewer there are, the more points of each are looked at in one go.
        points = min(_MOST_POINTS, max(1, _PROBES // max(1, len(some))))
        shares = np.arange(1, points + 1) / (points + 1)
        row = np.arange(len(some))
        while (low < high).any():
            at = low[:, None] + np.ceil((high - low)[:, None] * shares).astype(np.intp)
            held = (
                self._held(np.repeat(self._order[some], points), hashes[at - 1].ravel()).reshape(at.shape).sum(axis=1)
            )
            low, high = (
                np.where(held > 0, at[row, held - 1], low),
                np.where(held < points, at[row, np.minimum(held, points - 1)] - 1, high),
            )
        found[some] = low
        return found

    def _held(self, rows: NDArray[np.intp], hashes: Hashes) -> NDArray[np.bool_]:
        """Of each row, whether it has the hash beside it."""
        places, marks = self._places(hashes)
        held: NDArray[np.bool_] = (self._table[rows[:, None], places] == marks[:, None, None]).any(axis=(1, 2))
        return held

    def _places(self, hashes: Hashes) -> tuple[NDArray[np.intp], NDArray[np.uint32]]:
        """Both buckets of each, and what marks it there; 0 is an empty place."""
        low = hashes & _LOW
        second = low * _MIX >> _SHIFT
        places = np.stack((low % self._buckets, second % self._buckets), axis=1).astype(np.intp)
        return places, np.maximum((hashes >> _HIGH).astype(np.uint32), np.uint32(1))

    def _new(self, rows: int) -> NDArray[np.uint32]:
        self._free = list(range(rows - 1, len(self._rows) - 1, -1))
        return np.zeros((rows, int(self._buckets), _PLACES), np.uint32)
