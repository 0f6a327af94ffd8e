"""How long what a replica would drop next from its KV cache has not been used, by how fast it drops. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# What was dropped so long ago counts 1/e.
_FADES_AFTER_S = 60.0
# Less than one in many times that long is none.
_NONE = 1e-3


class Turnover:
    """Of the replicas of a pool, each by a row of its own.

    A cache that holds N blocks and drops R of them a second has turned over after N / R seconds: what is about to go
    has not been used for about that long, or less where much of what is asked for is there. When each block was used
    last nobody says, and to keep it here would cost as much as the blocks.
    """

    def __init__(self) -> None:
        self._dropped, self._noted_s = np.zeros(0), np.zeros(0)

    def note(self, row: int, dropped: int, now_s: float) -> None:
        """So many of its blocks went."""
        if (more := row + 1 - len(self._dropped)) > 0:
            self._dropped, self._noted_s = np.pad(self._dropped, (0, more)), np.pad(self._noted_s, (0, more))
        left = self._dropped[row] * math.exp((self._noted_s[row] - now_s) / _FADES_AFTER_S)
        self._dropped[row], self._noted_s[row] = left + dropped, now_s

    def forget(self, row: int) -> None:
        """Another replica may have it."""
        if row < len(self._dropped):
            self._dropped[row] = 0.0

    def ages_s(self, held: NDArray[np.intp], now_s: float) -> NDArray[np.float64]:
        """By row, where a replica holds so many blocks; infinite if it has dropped none for long."""
        dropped = self._dropped[: len(held)] * np.exp((self._noted_s[: len(held)] - now_s) / _FADES_AFTER_S)
        ages = np.full(len(held), math.inf)
        np.divide(held[: len(dropped)] * _FADES_AFTER_S, dropped, out=ages[: len(dropped)], where=dropped > _NONE)
        return ages
