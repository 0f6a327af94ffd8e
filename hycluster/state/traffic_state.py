"""The last hour's traffic, as it is told, against what is promised."""

from __future__ import annotations

from dataclasses import dataclass

from hycluster.traffic import KEEP_MINUTES, Minute, ModelTraffic, quantile


@dataclass(frozen=True, slots=True)
class Times:
    """Quantiles in seconds; null if nothing was measured."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class MinuteState:
    """One minute.

    Attributes:
        at: its begin, in seconds since the epoch.
        batch_output_tokens: of batch work; all else is of online requests.
        ttft_p95_s: null if there was no first token.
    """

    at: int
    answered: int
    failed: int
    shed: int
    unavailable: int
    output_tokens: int
    batch_output_tokens: int
    ttft_p95_s: float | None

    @property
    def unanswered(self) -> int:
        """Whose caller stayed, and got no answer."""
        return self.failed + self.shed + self.unavailable


@dataclass(frozen=True, slots=True)
class BatchTraffic:
    """Batch work that came to ingress processes: rows of jobs that are asked there, ``flex`` requests.

    Lines of batches are asked by the batch executor, and rows of some jobs by the job's own process.

    Attributes:
        answered: rows that have their whole answer.
        failed: that were taken, and ended without one.
        deferred: that were told to come back: for overload, or because no replica could serve.
    """

    answered: int
    failed: int
    deferred: int
    cancelled: int
    prompt_tokens: int
    output_tokens: int

    @property
    def asked(self) -> int:
        """All that came to an end, whichever."""
        return self.answered + self.failed + self.deferred + self.cancelled


@dataclass(frozen=True, slots=True)
class TrafficState:
    """An hour of online requests, and beside them of batch work.

    Attributes:
        objective: share of requests that are to be answered.
        asked: requests that ended, whichever way.
        failed: that were taken, and ended without an answer.
        shed: that were refused for overload; these don't count against the objective.
        unavailable: that were refused because no replica could serve.
        answered_share: that were, of those that were not shed and whose caller stayed; null if there were none.
        burn_rate: how many times as fast as allowed requests go unanswered; above 1 the objective is missed.
        cached_share: share of the prompts' tokens that a KV cache had.
        ttft_s, tpot_s: time to the first token, and for each one after it.
        minutes: of the last hour, the oldest first, with those in which nobody asked.
        batch: for whose rows nobody waits: no objective is about them.
    """

    objective: float
    asked: int
    answered: int
    cancelled: int
    failed: int
    shed: int
    unavailable: int
    answered_share: float | None
    burn_rate: float | None
    prompt_tokens: int
    output_tokens: int
    cached_share: float | None
    ttft_s: Times
    tpot_s: Times
    minutes: tuple[MinuteState, ...]
    batch: BatchTraffic


def traffic_state(counted: ModelTraffic, now: float, objective: float) -> TrafficState:
    """What was counted, as it is told at ``now`` (seconds since the epoch).

    Args:
        objective: share of requests that are to be answered.
    """
    last, hour, batch = int(now // 60), Minute(), Minute()
    numbers = range(last - KEEP_MINUTES + 1, last + 1)
    for number in numbers:
        hour.add(counted.minutes.get(number, Minute()))
        batch.add(counted.batch_minutes.get(number, Minute()))
    share = hour.answered / hour.owed if hour.owed else None
    return TrafficState(
        objective,
        hour.asked,
        hour.answered,
        hour.cancelled,
        hour.failed,
        hour.shed,
        hour.unavailable,
        share,
        None if share is None else round((1 - share) / (1 - objective), 2),
        hour.prompt_tokens,
        hour.output_tokens,
        round(hour.cached_tokens / hour.prompt_tokens, 4) if hour.prompt_tokens else None,
        _times(hour.ttft),
        _times(hour.tpot),
        tuple(_minute(number, counted) for number in numbers),
        BatchTraffic(
            batch.answered,
            batch.failed,
            batch.shed + batch.unavailable,
            batch.cancelled,
            batch.prompt_tokens,
            batch.output_tokens,
        ),
    )


def _times(counts: dict[int, int]) -> Times:
    return Times(quantile(counts, 0.5), quantile(counts, 0.95), quantile(counts, 0.99))


def _minute(number: int, counted: ModelTraffic) -> MinuteState:
    minute = counted.minutes.get(number, Minute())
    return MinuteState(
        number * 60,
        minute.answered,
        minute.failed,
        minute.shed,
        minute.unavailable,
        minute.output_tokens,
        counted.batch_minutes.get(number, Minute()).output_tokens,
        quantile(minute.ttft, 0.95),
    )
