"""Commands that the demo runs beside itself: started, listened to, and always stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HYCLUSTER = str(Path(sys.executable).with_name("hycluster"))
STOP_TIMEOUT_S = 90.0


class DemoFailed(Exception):
    """A step did not do what it should; the message says which and why."""


class Process:
    """A command of ours in the background: its output goes to a log and is kept to wait for lines of it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.name = " ".join(["hycluster", *arguments[:2]])
        self.log = log
        self.lines: list[str] = []
        # A session of its own: Ctrl-C reaches it through stop() only, in the right order.
        self._process = subprocess.Popen(
            [HYCLUSTER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output, self.log.open("w") as log:
            for line in output:
                log.write(line)
                log.flush()
                self.lines.append(line.rstrip())

    def wait_for(self, wanted: Callable[[str], Any], timeout_s: float, show: Callable[[str], None]) -> str | None:
        """The first line that is ``wanted``; None if the process ended well without one."""
        deadline = time.monotonic() + timeout_s
        read = 0
        while time.monotonic() < deadline:
            over = self._process.poll() is not None
            if over:
                self._reader.join(timeout=10)
            for line in self.lines[read:]:
                read += 1
                if wanted(line):
                    return line
                show(line)
            if over:
                self._ended_well()
                return None
            time.sleep(0.1)
        raise DemoFailed(f"{self.name}: not done after {timeout_s:.0f} s; its log is {self.log}")

    def wait(self, timeout_s: float, show: Callable[[str], None]) -> None:
        self.wait_for(lambda line: False, timeout_s, show)

    def running(self) -> bool:
        return self._process.poll() is None

    def _ended_well(self) -> None:
        if self._process.returncode:
            tail = "\n".join(f"  | {line}" for line in self.lines[-15:])
            raise DemoFailed(f"{self.name}: exit code {self._process.returncode}; its log is {self.log}\n{tail}")

    def stop(self) -> bool:
        """Ask to end, and make it end. Returns whether it ended by itself with exit code 0."""
        if self.running():
            self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # The group is that of the session started above: the process and its children only.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=10)
        return self._process.returncode == 0
