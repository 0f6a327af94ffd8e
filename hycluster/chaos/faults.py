"""Carrying out a schedule: hit, watch until all is whole again, resume what was stopped, hit again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hycluster.chaos.pool import IngressProcesses, PoolMembers, members
from hycluster.chaos.schedule import Fault, FaultKind, Where
from hycluster.chaos.targets import Target, TargetProcess, Targets
from hycluster.settings.model import Model

POLL_S = 0.2


@dataclass(slots=True)
class InjectedFault:
    """A fault that was carried out. Times are on ``time.monotonic``'s clock.

    Attributes:
        hit: who was hit, and which process of it.
        before: who was there before.
        resumed: those that were stopped run again, if they live.
        whole_after_s: from the fault until the pool, or the ingress processes, were whole again; None if that did not
            come, or if nobody waits for it (``Where.BATCH``).
        done: nobody waits for it any more.
    """

    fault: Fault
    at_s: float
    hit: list[tuple[Target, TargetProcess]]
    before: PoolMembers | None
    resumed: bool = False
    whole_after_s: float | None = None
    done: bool = False

    def __str__(self) -> str:
        who = ", ".join(f"{target.name} ({process.role}, pid {process.pid})" for target, process in self.hit)
        return f"{self.fault.kind} {who or f'no {self.fault.where}: there is none'}"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds for which things are let be.

    Attributes:
        stop_s: a stopped process is resumed then, if it was not replaced before.
        delay_s: one that is delayed is stopped for so long.
        recovery_s: the pool is given up on if it is not whole by then.
    """

    stop_s: float
    delay_s: float
    recovery_s: float


@dataclass(slots=True)
class FaultInjector:
    """Carries out a schedule on a thread of its own.

    Args:
        wait: faults wait until all is whole again; else only for their pause after the fault before.
        say: told of what happens, a line each.
    """

    targets: Targets
    model: Model
    ingresses: IngressProcesses
    patience: Patience
    wait: bool
    say: Callable[[str], None]
    injections: list[InjectedFault] = field(default_factory=list)
    _stopped: set[TargetProcess] = field(default_factory=set)

    def run(self, schedule: Sequence[Fault], stopping: threading.Event) -> None:
        """Return when the last fault is over, or one of them never is, or ``stopping`` is set."""
        coming, last_s = list(schedule), time.monotonic()
        try:
            while (coming or self._open) and not stopping.wait(POLL_S):
                for injected in self._open:
                    self._look(injected)
                    if injected.done:
                        last_s = max(last_s, time.monotonic() if self.wait else injected.at_s)
                if any(
                    injected.done and injected.whole_after_s is None and injected.before for injected in self.injections
                ):
                    return
                if coming and not (self.wait and self._open) and time.monotonic() - last_s >= coming[0].pause_s:
                    self.injections.append(self._inject(coming.pop(0)))
                    last_s = time.monotonic()
        finally:
            self._resume(self._stopped)

    @property
    def _open(self) -> list[InjectedFault]:
        return [injected for injected in self.injections if not injected.done]

    def _inject(self, fault: Fault) -> InjectedFault:
        hit = []
        for target, pick in fault.choose(self.targets.find(fault.where)):
            if processes := self.targets.processes(target):
                hit.append((target, processes[int(pick.process * len(processes))]))
        before = members(self.model) if fault.where is not Where.BATCH and hit else None
        injected = InjectedFault(fault, time.monotonic(), hit, before)
        victims = [process for _, process in hit]
        if fault.kind is FaultKind.KILL:
            self.targets.send(victims, signal.SIGKILL)
        elif fault.kind is FaultKind.STOP:
            self._stopped.update(victims)
            self.targets.send(victims, signal.SIGSTOP)
        else:
            self.targets.send(victims, signal.SIGSTOP, self.patience.delay_s)
            injected.resumed = True
        self.say(str(injected))
        # Nobody to wait for.
        injected.done = before is None and fault.kind is not FaultKind.STOP
        return injected

    def _look(self, injected: InjectedFault) -> None:
        age_s = time.monotonic() - injected.at_s
        victims = {process for _, process in injected.hit}
        if injected.fault.kind is FaultKind.STOP and not injected.resumed and age_s > self.patience.stop_s:
            self.say(f"resume what still is of fault {injected.fault.number + 1}")
            self._resume(victims)
            injected.resumed = True
        if injected.before is None:
            injected.done = injected.resumed
        elif self._whole(injected):
            injected.whole_after_s, injected.done = age_s, True
            self.say(f"whole again after {age_s:.1f} s")
        elif age_s > self.patience.recovery_s:
            injected.done = True
            self.say(f"not whole again within {age_s:.0f} s; no more faults")
        if injected.done:
            # One that was replaced meanwhile must do no harm when it runs again.
            self._resume(victims & self._stopped)

    def _whole(self, injected: InjectedFault) -> bool:
        gone = [target for target, _ in injected.hit] if not injected.resumed else []
        now, before = members(self.model), injected.before
        if now is None or before is None:
            return False
        if injected.fault.where is not Where.INGRESS:
            return now.whole_without(before, len(gone))
        stopped = gone if injected.fault.kind is FaultKind.STOP else []
        living = [target for target in stopped if self.targets.lives(target)]
        return self.ingresses.whole_without(self.targets, living, before, now, len(gone))

    def _resume(self, processes: set[TargetProcess]) -> None:
        if processes:
            self.targets.send(sorted(processes, key=lambda process: process.pid), signal.SIGCONT)
            self._stopped -= set(processes)
