from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from hycluster.chaos.ask import Reply, Trace
from hycluster.chaos.faults import InjectedFault
from hycluster.chaos.gateways import MigrationTotals
from hycluster.chaos.load import Outcome
from hycluster.chaos.pool import PoolMembers
from hycluster.chaos.report import Report, Spread, compare_outcomes, gaps_at_faults, show_report
from hycluster.chaos.schedule import Fault, FaultKind, Pick, Where
from hycluster.chaos.targets import Target, TargetProcess
from tests.chaos.answers import answer, request


def outcome(number: int = 0, got: Reply | None = None, error: str | None = None, **more: Any) -> Outcome:
    """A stream from second 100 to 110, with a token in each second but the 105th to the 107th."""
    trace = Trace(begun_s=100.0, ended_s=110.0)
    trace.times_s[0] += [101.0, 102.0, 103.0, 104.0, 108.0, 109.0, 110.0]
    return Outcome(request(number), trace, None if error else got or answer(), error, **more)


def injected(
    kind: FaultKind = FaultKind.KILL, whole_after_s: float | None = 4.0, hit: int = 1, at_s: float = 104.5
) -> InjectedFault:
    fault = Fault(0, kind, Where.REPLICA, 1.0, (Pick(0, 0),) * hit)
    victim = Target(Where.REPLICA, "replica-m#a", "id", "node", 1), TargetProcess("node", 1, 0.0, "replica")
    return InjectedFault(
        fault, at_s, [victim] * hit, PoolMembers(1, frozenset("a")), whole_after_s=whole_after_s, done=True
    )


def reported(
    *outcomes: Outcome, injections: tuple[InjectedFault, ...] = (), reference: Outcome | None = None
) -> Report:
    migrated = MigrationTotals(requests=3, tokens_recomputed=4, pauses={0.1: 2, 0.5: 1})
    undisturbed = [reference or outcome(), outcome(1)]
    return compare_outcomes("m", 5, undisturbed, outcomes, injections, migrated, 12.34)


def printed(found: Report) -> str:
    out = io.StringIO()
    show_report(found, Console(file=out, width=100))
    return out.getvalue()


def test_all_well() -> None:
    found = reported(outcome(), outcome(1), injections=(injected(), injected(hit=2), injected(FaultKind.STOP, 9.0)))
    assert found.well
    assert (found.requests, found.exact_requests) == (2, 2)
    assert found.faults == {"kill replica": 3, "stop replica": 1}
    assert found.whole_after_s == {"kill replica": Spread(4.0, 4.0, 4.0), "stop replica": Spread(9.0, 9.0, 9.0)}
    assert found.streams_at_fault == 6
    assert found.gap_at_fault_s == Spread(4.0, 4.0, 4.0)
    assert found.pause_s == Spread(0.1, 0.5, 0.5)
    table = " ".join(printed(found).replace("│", " ").split())
    for row in (
        "chaos on m, seed 5",
        " failures 0 ",
        " computed twice 4 (25.00%) ",
        " of 3 migrated requests 0.10 / 0.50 / 0.50 ",
        " faults: kill replica 3 ",
        " stop replica 9.00 / 9.00 / 9.00 ",
    ):
        assert row in table


def test_a_failure_a_wrong_answer_and_a_pool_that_stays_broken_are_told() -> None:
    failed = reported(outcome(error="Unavailable: gone"))
    assert not failed.well
    assert "failed: request 0 (http, completion, greedy, at most 3 tokens): Unavailable: gone" in printed(failed)
    wrong = reported(outcome(got=answer((1, 2, 9))))
    assert not wrong.well
    assert "wrong: request 0 (http, completion, greedy, at most 3 tokens): token 2 of 3 is 9" in printed(wrong)
    broken = reported(outcome(), injections=(injected(whole_after_s=None),))
    assert not broken.well
    assert broken.not_whole == 1
    assert "not whole again after" in printed(broken)


def test_a_reference_that_failed_proves_nothing() -> None:
    for reference in (outcome(error="Overloaded: full"), outcome(got=answer(finish_reason=None))):
        found = reported(outcome(), reference=reference)
        assert not found.well
        assert "failed undisturbed: request 0" in printed(found)


def test_json_has_every_figure() -> None:
    found = reported(outcome(restarts=2), outcome(refusals=1), injections=(injected(hit=0),))
    as_json = json.loads(json.dumps(found.as_json()))
    assert as_json["well"] is True
    assert (as_json["restarted"], as_json["refused"], as_json["not_injected"]) == (1, 1, 1)
    assert as_json["migrated"]["tokens_recomputed"] == 4
    assert as_json["gap_s"] == {"p50": 4.0, "p99": 4.0, "max": 4.0}


def test_gaps_count_from_the_fault_on() -> None:
    assert gaps_at_faults([outcome()], [100.5, 104.5, 108.5, 111.0]) == [4.0, 4.0, 1.0]


def test_nearest_rank() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 3.0, 3.0)
    assert Spread.of(list(range(1, 101))) == Spread(50, 99, 100)
    assert Spread.of([]) == Spread(None, None, None)
