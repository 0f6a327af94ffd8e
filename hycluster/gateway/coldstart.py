"""Who comes while a pool has no replica: whether they wait, what they are told, and that the scaler hears of them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from hycluster.directory.autoscaling import Scaling
from hycluster.errors import Unavailable
from hycluster.pool_health import StartTrouble
from hycluster.settings.model import Model

# What a caller is told as long as no start has been timed.
UNKNOWN_RETRY_AFTER_S = 5.0
# Until the scaler has heard and acted, which the time of a start does not count.
NOTICED_AFTER_S = 1.0
# How much later than told a caller may come back; until then it counts as one that waits.
LATE_S = 10.0


class ColdStart:
    """What one gateway knows of its pool's sleep. A pool that always has replicas never sleeps.

    Args:
        patient: requests wait, whatever the settings say: nobody is there to come back.
        clock: seconds, monotonic.

    Attributes:
        scaling: what the pool's scaler last said.
        trouble: why replicas do not start, if they don't.
        last_start_s: how long the last start took that anybody has told of.
        asleep: set while there is to be no replica.
    """

    def __init__(self, model: Model, *, patient: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        self._patient = patient
        self._awaited_until_s = -math.inf
        self.scaling: Scaling | None = None
        self.trouble: StartTrouble | None = None
        self.last_start_s: float | None = None
        self.asleep = asyncio.Event()

    @property
    def wakes(self) -> bool:
        """A request that finds no replica has one started."""
        return self._model.sleeps

    @property
    def wait_s(self) -> float | None:
        """How long such a request waits for it; None: it is refused."""
        rules = self._model.autoscaling
        waits = self.wakes and (self._patient or rules.cold_start == "wait")
        return rules.max_cold_start_wait_s if waits else None

    def hear(self, scaling: Scaling | None, trouble: StartTrouble | None = None) -> None:
        """The scaler's word, and the directory's of starts that failed; None if there is none."""
        self.scaling, self.trouble = scaling, trouble
        if scaling is not None and scaling.cold_start_s is not None:
            self.last_start_s = scaling.cold_start_s
        if scaling is not None and scaling.target == 0:
            self.asleep.set()
        else:
            self.asleep.clear()

    def want(self) -> None:
        """Someone needs a replica who is no request."""
        self._awaited_until_s = math.inf

    def want_no_more(self) -> None:
        self._awaited_until_s = -math.inf

    @property
    def awaited(self) -> int:
        """1 as long as somebody who is not here any more counts on a replica."""
        return int(self._clock() < self._awaited_until_s)

    def refusal(self) -> Unavailable:
        """What to tell a caller that finds no replica; from now on the pool is to start one."""
        name = repr(self._model.name)
        why = f": {self.trouble.told()}" if self.trouble else ""
        if not self.wakes:
            retry_after_s = max(1.0, self.trouble.retry_in_s if self.trouble else 0.0)
            return Unavailable(f"model: no replica of {name} can serve now{why}", retry_after_s=retry_after_s)
        retry_after_s = self.retry_after_s()
        self._awaited_until_s = max(self._awaited_until_s, self._clock() + retry_after_s + LATE_S)
        known_s = self.last_start_s
        took = "how long that takes is not known yet" if known_s is None else f"the last start took {known_s:.0f} s"
        return Unavailable(
            f"model: {name} is starting, as nobody had asked for it; {took}{why}", retry_after_s=retry_after_s
        )

    def retry_after_s(self) -> float:
        """When a replica will be there, by the time that the last one took."""
        if self.last_start_s is None:
            return UNKNOWN_RETRY_AFTER_S
        begun_s = self.scaling.starting_for_s if self.scaling else None
        return max(1.0, self.last_start_s - (-NOTICED_AFTER_S if begun_s is None else begun_s))
