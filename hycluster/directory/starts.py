"""Starts of a model's replicas that failed: why, how often, and how long the next one waits.

Ray Serve tries at once again, for ever (``hycluster/app.py``); what keeps a model that can't start from wearing a
machine down is the pause that each start asks the directory for. All of this is soft state of the directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hycluster.errors import SettingsError
from hycluster.pool_health import StartTrouble

# By itself Serve gives a deployment up for good after three starts a replica that fail, as long as none has succeeded.
# What could not start may be able to later: memory is free again, weights are there. So it tries on, with pauses.
ENDLESS = 1_000_000
CONTROLLER_OPTIONS = {"runtime_env": {"env_vars": {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": str(ENDLESS)}}}
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
DIED_SILENTLY = "its process ended while it started; Ray's log of it may say why"


# What a start waits for before it does anything, because others failed before it; where none did, its process is up.
TURN, PROCESS = "turn", "process"


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage of a start, and how long it took, or has taken so far."""

    name: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class StartingReplica:
    """A replica that is not ready yet.

    Attributes:
        replica: Ray's id of its actor.
        stages: those that it has been through, and the one that it is in.
    """

    replica: str
    stages: tuple[StageTime, ...]

    @property
    def stage(self) -> str:
        return self.stages[-1].name


class Starts:
    """One model's.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Those that have begun and told no end.
        self._open: list[str] = []
        # Only to be shown: the times at which each began its stages.
        self._stages: dict[str, list[tuple[str, float]]] = {}
        self._begin_again()

    def _begin_again(self) -> None:
        self._failures = 0
        self._settings_errors = 0
        self._hopeless = False
        self._last = ("", "")
        self._retry_at_s = 0.0

    def begin(self, replica: str, wanted: int) -> float:
        """A start begins; returns the seconds that it is to wait before it does anything.

        Args:
            wanted: how many replicas there are to be. More starts than that at once means that one died silently.
        """
        if len(self._open) >= max(1, wanted):
            self.failed(self._open[0], wanted, "EngineStartFailed", DIED_SILENTLY)
        self._open.append(replica)
        for other in [one for one in self._stages if one not in self._open][: max(0, len(self._stages) + 1 - wanted)]:
            # It told no end, and another one is in its place.
            del self._stages[other]
        pause_s = max(0.0, self._retry_at_s - self._clock())
        self._stages[replica] = [(TURN if pause_s else PROCESS, self._clock())]
        return pause_s

    def stage(self, replica: str, name: str) -> None:
        """A start has come to its next stage."""
        self._stages.setdefault(replica, []).append((name, self._clock()))

    def ended(self, replica: str) -> None:
        """A start has succeeded, and its replica reports from now on."""
        self._stages.pop(replica, None)

    @property
    def starting(self) -> tuple[StartingReplica, ...]:
        """The replicas that are not ready yet."""
        now = self._clock()
        return tuple(
            StartingReplica(
                replica,
                tuple(
                    StageTime(name, until - since)
                    for (name, since), (_, until) in zip(stages, [*stages[1:], ("", now)], strict=True)
                    # Nobody waited.
                    if name not in (TURN, PROCESS) or until - since >= 0.5 or len(stages) == 1
                ),
            )
            for replica, stages in self._stages.items()
        )

    def failed(self, replica: str, wanted: int, kind: str, reason: str) -> None:
        """A start has failed."""
        if replica in self._open:
            self._open.remove(replica)
        self._stages.pop(replica, None)
        self._failures += 1
        self._settings_errors += kind == SettingsError.__name__
        self._last = (kind, reason)
        # All replicas have had their turn before the next pause is longer.
        rounds = (self._failures - 1) // max(1, wanted)
        self._retry_at_s = self._clock() + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(rounds, 30))
        everyone = self._failures >= max(1, wanted) and not self._open
        self._hopeless |= everyone and self._settings_errors == self._failures

    def succeeded(self) -> None:
        """A replica is there that was not."""
        self._open.clear()
        self._begin_again()

    @property
    def trouble(self) -> StartTrouble | None:
        """None as long as no start has failed since one succeeded."""
        if not self._failures:
            return None
        kind, reason = self._last
        return StartTrouble(
            self._failures, kind, reason, max(0.0, self._retry_at_s - self._clock()), hopeless=self._hopeless
        )
