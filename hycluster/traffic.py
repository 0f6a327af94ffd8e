"""What callers got: answers, refusals, failures, tokens, waits. One count, of which there are two views.

A gateway tells its meter what becomes of each request. The meter keeps the last hour minute by minute, and by reason
what was refused, failed or left since it began, for ``/metrics`` (``hycluster/observe/gateways.py``). What it keeps of
the hour each ingress process tells the directory, so that any of them, and ``hycluster status``, knows the sum: of one
model that is some kilobytes.

As vLLM counts: a request for several outputs is as many as these. Rows of batch work have no caller who waits: they are
counted apart, and no objective is about them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

KEEP_MINUTES = 60
# Upper bounds of the classes that times are counted in, a quarter more each: quantiles are right to an eighth.
SMALLEST_S, RATIO, CLASSES = 0.001, 1.25, 64

# Why no engine is given a request: a bound of the settings' ``admission``, or no replica.
Refusal = Literal["overloaded", "unavailable"]


def class_of(seconds: float) -> int:
    """The class that a time is counted in."""
    if seconds <= SMALLEST_S:
        return 0
    return min(CLASSES - 1, math.ceil(math.log(seconds / SMALLEST_S) / math.log(RATIO)))


def quantile(counts: Mapping[int, int], share: float) -> float | None:
    """The time that ``share`` of what was counted did not exceed, in seconds; None if nothing was."""
    wanted, seen = share * sum(counts.values()), 0
    for number in sorted(counts):
        seen += counts[number]
        if seen >= wanted:
            # The middle of the class, by ratio.
            return float(SMALLEST_S * RATIO ** (number - 0.5)) if number else SMALLEST_S
    return None


@dataclass(slots=True)
class Minute:
    """What was counted within a minute, or summed over several.

    Attributes:
        answered: requests that have their whole answer.
        cancelled: whose caller left before that.
        failed: that were lost to the service, or to an engine's error, after they were taken.
        shed: refused because of load.
        unavailable: refused because no replica could serve.
        ttft, tpot: how many in each class of times (:func:`class_of`): to the first token, and for each one after it.
    """

    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    shed: int = 0
    unavailable: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft: dict[int, int] = field(default_factory=dict)
    tpot: dict[int, int] = field(default_factory=dict)

    def add(self, other: Minute) -> None:
        self.answered += other.answered
        self.cancelled += other.cancelled
        self.failed += other.failed
        self.shed += other.shed
        self.unavailable += other.unavailable
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        for mine, others in ((self.ttft, other.ttft), (self.tpot, other.tpot)):
            for number, count in others.items():
                mine[number] = mine.get(number, 0) + count

    @property
    def owed(self) -> int:
        """Requests that were to be answered. Who left by himself is owed nothing, and who came over a bound that the
        settings draw was told when to come back."""
        return self.answered + self.failed + self.unavailable

    @property
    def asked(self) -> int:
        """All that came to an end here, whichever."""
        return self.owed + self.shed + self.cancelled


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What one ingress process has counted of one model.

    Attributes:
        minutes: by minutes since the epoch, of online requests.
        batch_minutes: the same of batch work.
    """

    minutes: dict[int, Minute] = field(default_factory=dict)
    batch_minutes: dict[int, Minute] = field(default_factory=dict)


class TrafficMeter:
    """Counts one model's online requests, or its batch work, at one ingress process.

    Args:
        clock: seconds since the epoch.

    Attributes:
        refused: since it began, requests that no engine was given, by reason.
        failed: since it began, requests that were taken and ended without an answer, by the error's name.
        cancelled: since it began, requests whose caller left.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.cancelled = 0
        self._clock = clock
        self._minutes: dict[int, Minute] = {}

    @property
    def _now(self) -> Minute:
        number = int(self._clock() // 60)
        if number not in self._minutes:
            self._minutes = {at: kept for at, kept in self._minutes.items() if at > number - KEEP_MINUTES}
            self._minutes[number] = Minute()
        return self._minutes[number]

    def refuse(self, reason: Refusal) -> None:
        """A request is not given to any engine."""
        self.refused[reason] += 1
        if reason == "overloaded":
            self._now.shed += 1
        else:
            self._now.unavailable += 1

    def fail(self, error: str) -> None:
        """A request that was taken has ended without an answer, by an error of this name."""
        self.failed[error] += 1
        self._now.failed += 1

    def cancel(self, requests: int = 1) -> None:
        """The caller of so many has left, before the whole answer was there."""
        self.cancelled += requests
        self._now.cancelled += requests

    def first_token(self, seconds: float) -> None:
        """One has come, so long after its request."""
        ttft, number = self._now.ttft, class_of(seconds)
        ttft[number] = ttft.get(number, 0) + 1

    def answer(self, prompt_tokens: int, cached_tokens: int, output_tokens: int, tpot_s: float) -> None:
        """A request has its whole answer."""
        minute = self._now
        minute.answered += 1
        minute.prompt_tokens += prompt_tokens
        minute.cached_tokens += cached_tokens
        minute.output_tokens += output_tokens
        if output_tokens > 1:
            number = class_of(tpot_s)
            minute.tpot[number] = minute.tpot.get(number, 0) + 1

    @property
    def last_hour(self) -> dict[int, Minute]:
        """By minutes since the epoch."""
        oldest = int(self._clock() // 60) - KEEP_MINUTES
        return {at: kept for at, kept in self._minutes.items() if at > oldest}


class GatewayTraffic:
    """Both meters of one model at one ingress process.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.online, self.batch = TrafficMeter(clock), TrafficMeter(clock)

    def of(self, *, bulk: bool) -> TrafficMeter:
        """The one that a request is counted by."""
        return self.batch if bulk else self.online

    def report(self) -> ModelTraffic:
        """The last hour."""
        return ModelTraffic(self.online.last_hour, self.batch.last_hour)


def together(reports: Iterable[ModelTraffic]) -> ModelTraffic:
    """What all ingress processes have counted."""
    whole = ModelTraffic()
    for report in reports:
        for mine, theirs in ((whole.minutes, report.minutes), (whole.batch_minutes, report.batch_minutes)):
            for at, minute in theirs.items():
                mine.setdefault(at, Minute()).add(minute)
    return whole
