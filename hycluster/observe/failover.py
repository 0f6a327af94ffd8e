"""What lost replicas cost, under ``/metrics``: requests that were migrated, tokens computed once more, stalls."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.observe.catalogue import INGRESS, MIGRATED, PAUSES, RECOMPUTED
from hycluster.observe.watched import Watching

# Upper bounds in seconds, a quarter more each, so that a quantile read off them is right to an eighth.
PAUSE_BUCKETS_S = tuple(round(0.05 * 1.25**step, 4) for step in range(40))


class Migrations:
    """What one gateway has migrated.

    Attributes:
        requests: moves of a request from a lost replica to another one.
        tokens: prompts and outputs that the other one had to prefill though the lost one had computed them.
        pauses: how many fell in each bucket; the last is beyond them all.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.pauses = [0] * (len(PAUSE_BUCKETS_S) + 1)
        self.paused_s = 0.0
        self._since: dict[str, float] = {}

    def lost(self, request_id: str, heard_s: float) -> None:
        """Its replica is lost, of which the last word came at ``heard_s`` on ``time.monotonic``'s clock."""
        # One that had no token of that one is still waiting since the one before.
        self._since.setdefault(request_id, heard_s)

    def moved(self, recomputed_tokens: int) -> None:
        """A request has been sent to another replica."""
        self.requests += 1
        self.tokens += recomputed_tokens

    def went_on(self, request_id: str) -> None:
        """A request has its first output of the replica that it is on."""
        since = self._since.pop(request_id, None)
        if since is not None:
            pause_s = time.monotonic() - since
            self.pauses[bisect.bisect_left(PAUSE_BUCKETS_S, pause_s)] += 1
            self.paused_s += pause_s

    def ended(self, request_id: str) -> None:
        """Nobody waits for it any more."""
        self._since.pop(request_id, None)


class FailoverPool(Protocol):
    """What counts for one gateway."""

    migrated: Migrations


class FailoverMetrics(Watching[FailoverPool]):
    """Of all models."""

    def collect(self) -> Iterable[Metric]:
        requests, tokens, pauses = MIGRATED.counter(), RECOMPUTED.counter(), PAUSES.histogram()
        for model, pool in self.sources:
            labels, migrated = [model, INGRESS], pool.migrated
            requests.add_metric(labels, migrated.requests)
            tokens.add_metric(labels, migrated.tokens)
            bounds, sums, total = [*map(str, PAUSE_BUCKETS_S), "+Inf"], [], 0
            for count in migrated.pauses:
                total += count
                sums.append(total)
            pauses.add_metric(labels, list(zip(bounds, sums, strict=True)), migrated.paused_s)
        return [requests, tokens, pauses]


failover_metrics = FailoverMetrics()
REGISTRY.register(failover_metrics)
