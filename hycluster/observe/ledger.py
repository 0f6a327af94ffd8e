"""The usage ledger under ``/metrics``: what this process has written, for whom, and how far it is behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.ledger.entry import Outcome
from hycluster.ledger.keeper import LedgerFigures
from hycluster.observe.catalogue import (
    INGRESS,
    LEDGER_ENTRIES,
    LEDGER_LAG,
    LEDGER_LOST,
    PROJECT_COST,
    PROJECT_REQUESTS,
    PROJECT_TOKENS,
)
from hycluster.observe.watched import Watching


class LedgerMetrics(Watching[LedgerFigures]):
    """Of this process."""

    def collect(self) -> Iterable[Metric]:
        entries, lost, lag = LEDGER_ENTRIES.counter(), LEDGER_LOST.counter(), LEDGER_LAG.gauge()
        requests, tokens, cost = PROJECT_REQUESTS.counter(), PROJECT_TOKENS.counter(), PROJECT_COST.counter()
        for _, keeper in self.sources:
            entries.add_metric([INGRESS], keeper.entries)
            lost.add_metric([INGRESS], keeper.lost)
            lag.add_metric([INGRESS], keeper.lag_s())
            for owner, usage in keeper.tally:
                for outcome in get_args(Outcome):
                    requests.add_metric([*owner, outcome, INGRESS], usage.requests[outcome])
                kinds = {"input": usage.computed_tokens, "cached": usage.cached_tokens, "output": usage.output_tokens}
                for kind, number in kinds.items():
                    tokens.add_metric([*owner, kind, INGRESS], number)
                cost.add_metric([*owner, INGRESS], float(usage.cost))
        return [family for family in (entries, lost, lag, requests, tokens, cost) if family.samples]


ledger_metrics = LedgerMetrics()
REGISTRY.register(ledger_metrics)
