"""How a model's pool is: how many replicas serve, and why others do not start. Nouns without dependencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StartTrouble:
    """Why a model has fewer replicas than it is to have.

    Attributes:
        failures: starts that failed since one succeeded.
        kind: name of the last one's error.
        reason: the last one's, in one line.
        retry_in_s: when the next start begins; 0 while one runs.
        hopeless: every start of every replica ended with a SettingsError; trying again would not change that.
    """

    failures: int
    kind: str
    reason: str
    retry_in_s: float
    hopeless: bool = False

    def told(self) -> str:
        """In one line."""
        starts = "a replica did not start" if self.failures == 1 else f"{self.failures} starts of replicas failed"
        return f"{starts}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """One model's replicas: those that take requests, and those that there are to be.

    Attributes:
        wakes: a request that finds none has one started.
        trouble: why replicas do not start, if they don't.
        cut_off: there are replicas, and this ingress process has reached none of them for a while.
        lost: by id, replicas that it has lost, and that nobody else has missed yet.
    """

    replicas_ready: int
    replicas_wanted: int
    wakes: bool = False
    trouble: StartTrouble | None = None
    cut_off: bool = False
    lost: frozenset[str] = frozenset()

    @property
    def able(self) -> bool:
        return self.replicas_ready > 0 or self.wakes

    def told(self) -> dict[str, Any]:
        """As callers read it; a pool that never sleeps, or has no trouble, says nothing of it."""
        told: dict[str, Any] = {"replicas_ready": self.replicas_ready, "replicas_wanted": self.replicas_wanted}
        if self.wakes:
            told["wakes"] = True
        if self.trouble is not None:
            told |= {
                "failed_starts": self.trouble.failures,
                "reason": self.trouble.reason,
                "next_start_in_s": math.ceil(self.trouble.retry_in_s),
            }
        return told


def able(pools: Mapping[str, PoolHealth]) -> bool:
    """Whether callers are to come to an ingress process that sees the pools like this."""
    return any(pool.able for pool in pools.values()) and not any(pool.cut_off for pool in pools.values())
