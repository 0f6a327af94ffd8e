"""The fault injector against targets of paper: what it does when, and that nothing stays stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from hycluster.chaos import faults as chaos_faults
from hycluster.chaos.faults import FaultInjector, Patience
from hycluster.chaos.pool import IngressProcesses, PoolMembers
from hycluster.chaos.schedule import Fault, FaultKind, Pick, Where
from hycluster.chaos.targets import Target, TargetProcess

POOL = frozenset("abc")


class Paper:
    """Stands in for ``Targets`` and for the directory. A killed replica has a successor at the second look."""

    def __init__(self, *, replaced: bool = True) -> None:
        self.sent: list[tuple[str, int, float | None]] = []
        self.there = set(POOL)
        self._replaced = replaced
        self._looks = 0

    def find(self, where: Where) -> list[Target]:
        if where is Where.BATCH:
            return []
        return [Target(where, name, name, "node", ord(name)) for name in sorted(self.there)]

    def processes(self, target: Target) -> list[TargetProcess]:
        return [TargetProcess("node", target.pid, 0.0, role) for role in ("replica", "rank")]

    def send(self, processes: Sequence[TargetProcess], number: int, resume_after_s: float | None = None) -> list[bool]:
        self.sent += [(chr(process.pid), number, resume_after_s) for process in processes]
        if number == signal.SIGKILL:
            self.there -= {chr(process.pid) for process in processes}
            self._looks = 0
        return [True] * len(processes)

    def members(self, _: Any) -> PoolMembers:
        self._looks += 1
        if self._replaced and self._looks > 1:
            self.there |= {chr(ord("d") + len(self.sent) + n) for n in range(3 - len(self.there))}
        return PoolMembers(3, frozenset(self.there))

    def lives(self, _: Target) -> bool:
        return True

    def listening(self, _: Sequence[int]) -> list[Target]:
        return self.find(Where.INGRESS)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_faults, "POLL_S", 0.001)


def run(
    monkeypatch: pytest.MonkeyPatch, paper: Paper, *faults: Fault, wait: bool = True, **seconds: float
) -> tuple[FaultInjector, list[str]]:
    monkeypatch.setattr(chaos_faults, "members", paper.members)
    said: list[str] = []
    patience = Patience(**{"stop_s": 0.02, "delay_s": 0.5, "recovery_s": 5.0, **seconds})
    targets: Any = paper
    model: Any = None
    injector = FaultInjector(targets, model, IngressProcesses(3, (1, 2)), patience, wait, said.append)
    injector.run(faults, threading.Event())
    return injector, said


def fault(
    kind: FaultKind, where: Where = Where.REPLICA, together: int = 1, number: int = 0, process: float = 0.0
) -> Fault:
    return Fault(number, kind, where, 0.0, (Pick(0.0, process),) * together)


def test_kills_wait_until_the_pool_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper()
    injector, said = run(monkeypatch, paper, fault(FaultKind.KILL), fault(FaultKind.KILL, together=2, number=1))
    assert [name for name, *_ in paper.sent] == ["a", "b", "c"]
    assert [len(injected.hit) for injected in injector.injections] == [1, 2]
    assert all(injected.whole_after_s is not None for injected in injector.injections)
    assert said[0] == "kill a (replica, pid 97)"
    assert said[1].startswith("whole again after")
    assert len(paper.there) == 3


def test_any_process_of_a_replica_may_be_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    injector, _ = run(monkeypatch, Paper(), fault(FaultKind.KILL, process=0.9))
    assert injector.injections[0].hit[0][1].role == "rank"


def test_a_pool_that_stays_broken_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper(replaced=False)
    injector, said = run(monkeypatch, paper, fault(FaultKind.KILL), fault(FaultKind.KILL, number=1), recovery_s=0.05)
    assert len(injector.injections) == 1
    assert injector.injections[0].whole_after_s is None
    assert "no more faults" in said[-1]


@pytest.mark.parametrize("where", [Where.REPLICA, Where.INGRESS])
def test_what_is_stopped_is_resumed(monkeypatch: pytest.MonkeyPatch, where: Where) -> None:
    paper = Paper()
    injector, said = run(monkeypatch, paper, fault(FaultKind.STOP, where))
    assert paper.sent == [("a", signal.SIGSTOP, None), ("a", signal.SIGCONT, None)]
    assert (injector.injections[0].whole_after_s or 0) > 0.02
    assert said[1] == "resume what still is of fault 1"


def test_what_is_stopped_is_resumed_also_if_the_run_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper()

    def broken(_: Any) -> PoolMembers:
        if paper.sent:
            raise ConnectionError("Ray is gone")
        return PoolMembers(3, POOL)

    monkeypatch.setattr(paper, "members", broken)
    with pytest.raises(ConnectionError):
        run(monkeypatch, paper, fault(FaultKind.STOP), stop_s=60)
    assert [number for _, number, _ in paper.sent] == [signal.SIGSTOP, signal.SIGCONT]


def test_a_delay_resumes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper()
    injector, _ = run(monkeypatch, paper, fault(FaultKind.DELAY))
    assert paper.sent == [("a", signal.SIGSTOP, 0.5)]
    assert injector.injections[0].whole_after_s is not None


def test_nobody_to_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    injector, said = run(monkeypatch, Paper(), fault(FaultKind.KILL, Where.BATCH), fault(FaultKind.STOP, Where.BATCH))
    assert [injected.hit for injected in injector.injections] == [[], []]
    assert said[0] == "kill no batch: there is none"


def test_faults_that_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper()
    faults = [Fault(number, FaultKind.STOP, Where.REPLICA, 0.01, (Pick(0.9, 0.0),)) for number in range(2)]
    run(monkeypatch, paper, *faults, wait=False, stop_s=0.2)
    assert [number for _, number, _ in paper.sent] == [signal.SIGSTOP] * 2 + [signal.SIGCONT] * 2
