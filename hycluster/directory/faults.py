"""What went wrong with replicas lately, for whoever looks. Soft state of the directory, like the rest of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

KEPT = 50


@dataclass(frozen=True, slots=True)
class ReplicaFault:
    """A replica was lost, or did not start.

    Attributes:
        at: seconds since the epoch.
        what: in one line.
    """

    at: float
    model: str
    replica: str
    what: str


class FaultLog:
    """The last ones.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._faults: deque[ReplicaFault] = deque(maxlen=KEPT)

    def now(self) -> float:
        """By its clock."""
        return self._clock()

    def add(self, model: str, replica: str, what: str, at: float | None = None) -> None:
        """
        Args:
            at: when it was seen, if that was not now.
        """
        self._faults.append(ReplicaFault(self._clock() if at is None else at, model, replica, what))

    @property
    def newest_first(self) -> list[ReplicaFault]:
        return sorted(self._faults, key=lambda fault: fault.at)[::-1]
