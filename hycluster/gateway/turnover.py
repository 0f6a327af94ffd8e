"""How long what a replica would drop next from its KV cache has not been used, by how fast it drops. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What was dropped so long ago counts 1/e.
_FADES_AFTER_S = 60.0


@dataclass(slots=True)
class Turnover:
    """Of one replica.

    A cache that holds N blocks and drops R of them a second has turned over after N / R seconds: what is about to go
    has not been used for about that long, or less where much of what is asked for is there. When each block was used
    last nobody says, and to keep it here would cost as much as the blocks.
    """

    _dropped: float = 0.0
    _noted_s: float = -math.inf

    def note(self, dropped: int, now_s: float) -> None:
        """So many blocks went."""
        self._dropped = self._left(now_s) + dropped
        self._noted_s = now_s

    def age_s(self, held: int, now_s: float) -> float:
        """For a replica that holds so many blocks; infinite if it has dropped none for long."""
        dropped = self._left(now_s)
        # Less than one in many times that long is none.
        return held * _FADES_AFTER_S / dropped if dropped > 1e-3 else math.inf

    def _left(self, now_s: float) -> float:
        return self._dropped * math.exp((self._noted_s - now_s) / _FADES_AFTER_S)
