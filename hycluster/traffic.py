"""What callers got over the last hour, minute by minute: answers, refusals, failures, tokens, waits.

Each ingress process has a meter for each model and tells the directory what it holds, so that any of them, and
``hycluster status``, knows the sum. An hour of one model is some kilobytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

KEEP_MINUTES = 60
# Upper bounds of the classes that times are counted in, a quarter more each: quantiles are right to an eighth.
SMALLEST_S, RATIO, CLASSES = 0.001, 1.25, 64


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
        failed: that were lost to the service, or to an engine's error.
        shed: refused because of load, or because no replica could serve.
        ttft, tpot: how many in each class of times (:func:`class_of`): to the first token, and for each one after it.
    """

    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    shed: int = 0
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
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        for mine, others in ((self.ttft, other.ttft), (self.tpot, other.tpot)):
            for number, count in others.items():
                mine[number] = mine.get(number, 0) + count

    @property
    def owed(self) -> int:
        """Requests that were to be answered: who left by himself is owed nothing."""
        return self.answered + self.failed + self.shed


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What one ingress process has counted of one model.

    Attributes:
        minutes: by minutes since the epoch.
        prefixes: by replica, the tokens of prompts that it was given and those that it had in its KV cache, since this
            ingress process began.
    """

    minutes: dict[int, Minute] = field(default_factory=dict)
    prefixes: dict[str, tuple[int, int]] = field(default_factory=dict)


class TrafficMeter:
    """Counts one model's requests at one ingress process.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._minutes: dict[int, Minute] = {}
        self._prefixes: dict[str, tuple[int, int]] = {}

    @property
    def now(self) -> Minute:
        """This minute's counts, to be added to."""
        number = int(self._clock() // 60)
        if number not in self._minutes:
            self._minutes = {at: kept for at, kept in self._minutes.items() if at > number - KEEP_MINUTES}
            self._minutes[number] = Minute()
        return self._minutes[number]

    def first_token(self, seconds: float) -> None:
        ttft, number = self.now.ttft, class_of(seconds)
        ttft[number] = ttft.get(number, 0) + 1

    def answered(self, prompt_tokens: int, cached_tokens: int, output_tokens: int, tpot_s: float, replica: str) -> None:
        """A request has its whole answer."""
        minute = self.now
        minute.answered += 1
        minute.prompt_tokens += prompt_tokens
        minute.cached_tokens += cached_tokens
        minute.output_tokens += output_tokens
        if output_tokens > 1:
            number = class_of(tpot_s)
            minute.tpot[number] = minute.tpot.get(number, 0) + 1
        given, had = self._prefixes.get(replica, (0, 0))
        self._prefixes[replica] = (given + prompt_tokens, had + cached_tokens)

    def report(self, replicas: Iterable[str]) -> ModelTraffic:
        """All that is known.

        Args:
            replicas: those that are there; of others nothing is kept.
        """
        there = set(replicas)
        self._prefixes = {replica: tokens for replica, tokens in self._prefixes.items() if replica in there}
        oldest = int(self._clock() // 60) - KEEP_MINUTES
        return ModelTraffic({at: kept for at, kept in self._minutes.items() if at > oldest}, dict(self._prefixes))


def together(reports: Iterable[ModelTraffic]) -> ModelTraffic:
    """What all ingress processes have counted."""
    minutes: dict[int, Minute] = {}
    prefixes: dict[str, tuple[int, int]] = {}
    for report in reports:
        for at, minute in report.minutes.items():
            minutes.setdefault(at, Minute()).add(minute)
        for replica, (given, had) in report.prefixes.items():
            before = prefixes.get(replica, (0, 0))
            prefixes[replica] = (before[0] + given, before[1] + had)
    return ModelTraffic(minutes, prefixes)
