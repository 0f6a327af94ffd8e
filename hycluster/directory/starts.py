"""Starts of a model's replicas that failed: why, how often, and how long the next one waits.

Ray Serve tries at once again, for ever (``hycluster/app.py``); what keeps a model that can't start from wearing a
machine down is the pause that each start asks the directory for. All of this is soft state of the directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hycluster.errors import SettingsError
from hycluster.pool_health import StartTrouble

# By itself Serve gives a deployment up for good after three starts a replica that fail, as long as none has succeeded.
# What could not start may be able to later: memory is free again, weights are there. So it tries on, with pauses.
ENDLESS = 1_000_000
CONTROLLER_OPTIONS = {"runtime_env": {"env_vars": {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": str(ENDLESS)}}}
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
DIED_SILENTLY = "its process ended while it started; Ray's log of it may say why"


class Starts:
    """One model's.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Those that have begun and told no end.
        self._open: list[str] = []
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
        return max(0.0, self._retry_at_s - self._clock())

    def failed(self, replica: str, wanted: int, kind: str, reason: str) -> None:
        """A start has failed."""
        if replica in self._open:
            self._open.remove(replica)
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
