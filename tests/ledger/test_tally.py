from __future__ import annotations

from decimal import Decimal

import pytest

from hycluster.ledger import tally as of_tally
from hycluster.ledger.tally import OTHER, ProjectTally, ProjectUsage
from tests.ledger.entries import entry


def test_what_a_project_has_had() -> None:
    tally = ProjectTally()
    tally.count(entry())
    tally.count(entry(outcome="failed", input_tokens=3, cached_tokens=0, output_tokens=0, cost=Decimal("0.01")))
    # What came after its line.
    tally.count(entry(requests=0, input_tokens=0, cached_tokens=0, output_tokens=7, cost=Decimal(0)))
    ((owner, usage),) = tally
    assert owner == ("acme", "search")
    assert usage.requests == {"finished": 1, "failed": 1}
    assert (usage.computed_tokens, usage.cached_tokens, usage.output_tokens) == (9, 4, 12)
    assert usage.cost == Decimal("0.26")


def test_projects_without_end_are_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_tally, "MOST_PROJECTS", 2)
    now_s = 0.0
    tally = ProjectTally(lambda: now_s)

    def ask(*projects: str) -> dict[str, int]:
        for project in projects:
            tally.count(entry(project=project))
        return {project: usage.requests["finished"] for (_, project), usage in tally}

    others = OTHER[1]
    assert ask("a", "b", "c", "d", "a") == {"a": 2, "b": 1, others: 2}
    # One that has asked nothing for an hour makes room; what was among the others stays there: no sum shrinks.
    now_s = 3000.0
    assert ask("b") == {"a": 2, "b": 2, others: 2}
    now_s = 4000.0
    assert ask("d") == {"b": 2, "d": 1, others: 2}
    assert ask("a") == {"b": 2, "d": 1, others: 3}
    assert isinstance(dict(tally)[OTHER], ProjectUsage)
