"""Real processes: one that is watched, with one below it, and what is done to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from hycluster import watchdog
from tests.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.timeout(120)

# Prints the pids of its child and of its watchdog. Beats twice a second until it is told to hold its breath (a line on
# standard input).
WATCHED = """
import select, subprocess, sys, time
from hycluster.watchdog import Watchdog
child = subprocess.Popen(["sleep", "100"])
watchdog = Watchdog(stopped_after_s=1, silent_after_s=3)
print(child.pid, watchdog.pid, flush=True)
while not select.select([sys.stdin], [], [], 0.2)[0]:
    watchdog.beat()
    print(watchdog.pid, flush=True)
if sys.stdin.readline() == "close\\n":
    watchdog.close()
time.sleep(100)
"""


class Watched:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.itself = psutil.Process(self.process.pid)
        self.child, self.watchdog = (psutil.Process(pid) for pid in self.read())

    def read(self) -> list[int]:
        assert self.process.stdout is not None
        return [int(pid) for pid in self.process.stdout.readline().split()]

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def reason(self) -> str:
        """Why it was killed; waits until it and all below it are gone."""
        assert self.process.stderr is not None
        assert self.process.wait(PATIENCE_S) == -signal.SIGKILL
        _, alive = psutil.wait_procs([self.child, self.watchdog], PATIENCE_S)
        assert not alive
        return self.process.stderr.read()


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    with watched.process:
        yield watched
        for process in (watched.itself, watched.child, watched.watchdog):
            watchdog.kill_family(process)


def test_a_stopped_process_is_killed_with_all_below_it(watched: Watched) -> None:
    os.kill(watched.process.pid, signal.SIGSTOP)
    assert f"[{watched.process.pid}] stopped for 1 s" in watched.reason()


def test_so_is_one_with_a_stopped_process_below_it(watched: Watched) -> None:
    # Known once the watchdog has looked for it.
    time.sleep(watchdog.LOOK_EVERY_S)
    watched.child.suspend()
    assert f"[{watched.child.pid}] stopped for 1 s" in watched.reason()


def test_so_is_one_that_does_not_beat(watched: Watched) -> None:
    watched.read()
    watched.tell("hold your breath")
    assert "no sign of life for 3 s" in watched.reason()


def test_a_short_stop_is_forgiven(watched: Watched) -> None:
    for _ in range(3):
        os.kill(watched.process.pid, signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(watched.process.pid, signal.SIGCONT)
        time.sleep(2 * watchdog.LOOK_EVERY_S)
    assert watched.process.poll() is None


def test_the_watchdogs_own_pause_does_not_count(watched: Watched) -> None:
    """As when a whole machine sleeps, or a shell stops a process group."""
    watched.watchdog.suspend()
    os.kill(watched.process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(watched.process.pid, signal.SIGCONT)
    watched.watchdog.resume()
    time.sleep(1)
    assert watched.process.poll() is None


def test_a_lost_watchdog_is_replaced(watched: Watched) -> None:
    watched.read()
    watched.watchdog.kill()
    lost = watched.watchdog.pid

    def replaced() -> bool:
        (pid,) = watched.read()
        if pid != lost:
            watched.watchdog = psutil.Process(pid)
        return pid != lost

    eventually(replaced)
    os.kill(watched.process.pid, signal.SIGSTOP)
    assert "stopped" in watched.reason()


def test_one_that_is_closed_watches_no_longer(watched: Watched) -> None:
    watched.read()
    watched.tell("close")
    assert psutil.wait_procs([watched.watchdog], PATIENCE_S)[1] == []
    assert watched.process.poll() is None


def test_it_ends_with_what_it_watches(watched: Watched) -> None:
    watched.process.kill()
    assert psutil.wait_procs([watched.watchdog], PATIENCE_S)[1] == []


def test_a_process_ends_itself_with_all_below_it() -> None:
    script = "import subprocess; from hycluster.watchdog import end_this_process\n"
    script += "print(subprocess.Popen(['sleep', '100']).pid, flush=True); end_this_process('it is of no more use')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "it is of no more use" in done.stderr
    eventually(lambda: not psutil.pid_exists(int(done.stdout)))
