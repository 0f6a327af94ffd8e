"""Carrying out a schedule: hit, watch until all is whole again, resume what was stopped, hit again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hycluster.chaos.pool import Doors, Members, members
from hycluster.chaos.schedule import Fault, Kind, Where
from hycluster.chaos.targets import Process, Target, Targets
from hycluster.settings.model import Model

POLL_S = 0.2


@dataclass(slots=True)
class Strike:
    """A fault that was carried out. Times are on ``time.monotonic``'s clock.

    Attributes:
        hit: who was hit, and which process of it.
        before: who was there before.
        resumed: those that were stopped run again, if they live.
        whole_after_s: from the fault until the pool, or the doors, were whole again; None if that did not come, or
            if nobody waits for it (``Where.BATCH``).
        done: nobody waits for it any more.
    """

    fault: Fault
    at_s: float
    hit: list[tuple[Target, Process]]
    before: Members | None
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
class Striker:
    """Carries out a schedule on a thread of its own.

    Args:
        wait: faults wait until all is whole again; else only for their pause after the fault before.
        say: told of what happens, a line each.
    """

    targets: Targets
    model: Model
    doors: Doors
    patience: Patience
    wait: bool
    say: Callable[[str], None]
    strikes: list[Strike] = field(default_factory=list)
    _stopped: set[Process] = field(default_factory=set)

    def run(self, schedule: Sequence[Fault], stopping: threading.Event) -> None:
        """Return when the last fault is over, or one of them never is, or ``stopping`` is set."""
        coming, last_s = list(schedule), time.monotonic()
        try:
            while (coming or self._open) and not stopping.wait(POLL_S):
                for strike in self._open:
                    self._look(strike)
                    if strike.done:
                        last_s = max(last_s, time.monotonic() if self.wait else strike.at_s)
                if any(strike.done and strike.whole_after_s is None and strike.before for strike in self.strikes):
                    return
                if coming and not (self.wait and self._open) and time.monotonic() - last_s >= coming[0].pause_s:
                    self.strikes.append(self._strike(coming.pop(0)))
                    last_s = time.monotonic()
        finally:
            self._resume(self._stopped)

    @property
    def _open(self) -> list[Strike]:
        return [strike for strike in self.strikes if not strike.done]

    def _strike(self, fault: Fault) -> Strike:
        hit = []
        for target, pick in fault.choose(self.targets.find(fault.where)):
            if processes := self.targets.processes(target):
                hit.append((target, processes[int(pick.process * len(processes))]))
        before = members(self.model) if fault.where is not Where.BATCH and hit else None
        strike = Strike(fault, time.monotonic(), hit, before)
        victims = [process for _, process in hit]
        if fault.kind is Kind.KILL:
            self.targets.send(victims, signal.SIGKILL)
        elif fault.kind is Kind.STOP:
            self._stopped.update(victims)
            self.targets.send(victims, signal.SIGSTOP)
        else:
            self.targets.send(victims, signal.SIGSTOP, self.patience.delay_s)
            strike.resumed = True
        self.say(str(strike))
        # Nobody to wait for.
        strike.done = before is None and fault.kind is not Kind.STOP
        return strike

    def _look(self, strike: Strike) -> None:
        age_s = time.monotonic() - strike.at_s
        victims = {process for _, process in strike.hit}
        if strike.fault.kind is Kind.STOP and not strike.resumed and age_s > self.patience.stop_s:
            self.say(f"resume what still is of fault {strike.fault.number + 1}")
            self._resume(victims)
            strike.resumed = True
        if strike.before is None:
            strike.done = strike.resumed
        elif self._whole(strike):
            strike.whole_after_s, strike.done = age_s, True
            self.say(f"whole again after {age_s:.1f} s")
        elif age_s > self.patience.recovery_s:
            strike.done = True
            self.say(f"not whole again within {age_s:.0f} s; no more faults")
        if strike.done:
            # One that was replaced meanwhile must do no harm when it runs again.
            self._resume(victims & self._stopped)

    def _whole(self, strike: Strike) -> bool:
        gone = [target for target, _ in strike.hit] if not strike.resumed else []
        now, before = members(self.model), strike.before
        if now is None or before is None:
            return False
        if strike.fault.where is not Where.DOOR:
            return now.whole_without(before, len(gone))
        stopped = gone if strike.fault.kind is Kind.STOP else []
        living = [target for target in stopped if self.targets.lives(target)]
        return self.doors.whole_without(self.targets, living, before, now, len(gone))

    def _resume(self, processes: set[Process]) -> None:
        if processes:
            self.targets.send(sorted(processes, key=lambda process: process.pid), signal.SIGCONT)
            self._stopped -= set(processes)
