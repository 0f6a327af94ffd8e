"""The usage ledger under ``/metrics``: what this process has written, and how far it is behind."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from hycluster.ledger.keeper import LedgerFigures
from hycluster.observe.catalogue import INGRESS, LEDGER_ENTRIES, LEDGER_LAG, LEDGER_LOST
from hycluster.observe.watched import Watching


class LedgerMetrics(Watching[LedgerFigures]):
    """Of this process."""

    def collect(self) -> Iterable[Metric]:
        entries, lost, lag = LEDGER_ENTRIES.counter(), LEDGER_LOST.counter(), LEDGER_LAG.gauge()
        for _, keeper in self.sources:
            entries.add_metric([INGRESS], keeper.entries)
            lost.add_metric([INGRESS], keeper.lost)
            lag.add_metric([INGRESS], keeper.lag_s())
        return [family for family in (entries, lost, lag) if family.samples]


ledger_metrics = LedgerMetrics()
REGISTRY.register(ledger_metrics)
