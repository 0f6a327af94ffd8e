"""A small process beside a replica or an ingress process that kills it when it can't end itself.

Nobody inside a stopped process (SIGSTOP) can do anything about it, and neither can a thread once another one holds on
to Python's lock. Ray finds both only after its own checks have timed out several times. The watchdog looks at the
process and at all below it, an engine's tensor ranks among them, four times a second; as soon as it has killed what
stands still, connections close, gateways migrate its streams and Ray Serve starts a successor.

It counts time by its own looks. So a whole machine that is suspended, or a shell's Ctrl-Z, which stops both, ends
nothing, and a debugger's stop is none: the kernel tells the two apart.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import time

import psutil

logger = logging.getLogger(__name__)

# A process that has been stopped for so long is taken for lost. Callers' streams wait for it.
STOPPED_AFTER_S = 1.0
LOOK_EVERY_S = 0.25
# Looking for new processes walks all of the machine's.
FAMILY_EVERY_S = 5.0


class Watchdog:
    """Watches this process until :meth:`close`.

    Args:
        stopped_after_s: how long this process, or one below it, may be stopped.
        silent_after_s: how long this process may be without a beat, once it has given its first.
    """

    def __init__(self, *, stopped_after_s: float = STOPPED_AFTER_S, silent_after_s: float = math.inf) -> None:
        # -P, so that the modules beside this file do not hide others.
        self._command = [sys.executable, "-P", __file__, str(os.getpid()), str(stopped_after_s), str(silent_after_s)]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, bufsize=0)
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    @property
    def pid(self) -> int:
        return self._process.pid

    def beat(self) -> None:
        """Say that this process gets on; at least every few seconds, always on one thread."""
        assert self._process.stdin is not None
        try:
            # A full pipe takes nothing: None.
            heard = self._process.stdin.write(b".")
        except BrokenPipeError:
            heard = None
        if heard is None:
            logger.warning("the watchdog is gone; another one takes its place")
            self._process.kill()
            self.close()
            self._process = self._start()

    def close(self) -> None:
        """Watch no longer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def kill_family(process: psutil.Process) -> None:
    """SIGKILL a process and all below it but this one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = process.children(recursive=True)
        # From the top, so that none is left to wonder where its children are.
        for each in (process, *below):
            if each.pid != os.getpid():
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def end_this_process(why: str) -> None:
    """End this process and all below it at once, without a last word to anybody."""
    logger.error("this process ends: %s", why)
    kill_family(psutil.Process())
    os._exit(1)


def watch(pid: int, stopped_after_s: float, silent_after_s: float) -> None:
    """Watch until the process is gone or closes its end of the pipe, which is standard input here."""
    os.set_blocking(0, False)
    watched = psutil.Process(pid)
    stopped_s: dict[psutil.Process, float] = {}
    silent_s: float | None = None
    family_s = FAMILY_EVERY_S
    while os.getppid() == pid:
        if family_s >= FAMILY_EVERY_S:
            below, family_s = _below(watched), 0.0
        time.sleep(LOOK_EVERY_S)
        family_s += LOOK_EVERY_S
        try:
            if not os.read(0, 1 << 16):
                return
            silent_s = 0.0
        except BlockingIOError:
            silent_s = None if silent_s is None else silent_s + LOOK_EVERY_S
        stopped_s = {p: stopped_s.get(p, -LOOK_EVERY_S) + LOOK_EVERY_S for p in (watched, *below) if _is_stopped(p)}
        if max(stopped_s.values(), default=0.0) >= stopped_after_s:
            _kill(watched, f"{sorted(p.pid for p in stopped_s)} stopped for {stopped_after_s:g} s")
            return
        if silent_s is not None and silent_s > silent_after_s and not stopped_s:
            _kill(watched, f"no sign of life for {silent_after_s:g} s")
            return


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [each for each in process.children(recursive=True) if each.pid != os.getpid()]
    except psutil.NoSuchProcess:
        return []


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process, why: str) -> None:
    print(f"watchdog: process {process.pid} and all below it are killed: {why}", file=sys.stderr, flush=True)
    kill_family(process)


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
