from __future__ import annotations

from prometheus_client import CollectorRegistry

from hycluster.ledger.tally import ProjectTally
from hycluster.observe.catalogue import INGRESS
from hycluster.observe.ledger import LedgerMetrics
from tests.ledger.entries import entry


class Figures:
    entries, lost = 2, 0

    def __init__(self) -> None:
        self.tally = ProjectTally()

    def lag_s(self) -> float:
        return 1.5


def test_what_projects_have_had() -> None:
    registry, metrics, figures = CollectorRegistry(), LedgerMetrics(), Figures()
    registry.register(metrics)
    assert not list(registry.collect())
    metrics.watch("", figures)
    figures.tally.count(entry())
    figures.tally.count(entry(tenant="", project=""))
    owner = {"tenant": "acme", "project": "search", "ingress": INGRESS}

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"hycluster_{name}", labels)

    assert value("project_requests_total", **owner, outcome="finished") == 1
    # There from the start: a query over nothing says nothing.
    assert value("project_requests_total", **owner, outcome="failed") == 0
    tokens = {kind: value("project_tokens_total", **owner, kind=kind) for kind in ("input", "cached", "output")}
    assert tokens == {"input": 6, "cached": 4, "output": 5}
    assert value("project_cost_total", **owner) == 0.25
    assert value("project_requests_total", **owner | {"tenant": "", "project": ""}, outcome="finished") == 1
    assert value("ledger_lag_seconds", ingress=INGRESS) == 1.5
