"""Reads footers in a process of their own: a file that takes its reader along costs that file and no job.

Arrow ends the process at some files, such as those with encrypted columns and a plain footer. Which file it was is told
by what the process had answered before.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from hycluster.batch.input.footers import READERS, Footer, footer_or_fault, footers
from hycluster.errors import JobFailed
from hycluster.storage import Folder

# Files that are asked alone after the process has died: those that it may have been at.
ONE_BY_ONE = 2 * READERS
_MAIN = "import sys; from hycluster.batch.input.apart import answer_calls; answer_calls(int(sys.argv[1]))"


class _Reader:
    """The process; started when it is needed, and again when it has died. Answers one caller at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection[Any, Any] | None = None
        self._code = 0

    def footers(self, folder: Folder, paths: Sequence[str]) -> Iterator[Footer | str]:
        """As :func:`hycluster.batch.input.footers.footers`."""
        with self._lock:
            together = True
            while paths:
                asked = paths if together else paths[:ONE_BY_ONE]
                answered = 0
                for answer in self._ask(folder, asked, together):
                    yield answer
                    answered += 1
                paths = paths[answered:]
                if answered < len(asked) and not together:
                    # Asked one by one: it was the next one.
                    yield f"is not a readable Parquet file: its footer ends the process that reads it ({self._died()})"
                    paths = paths[1:]
                together = not together

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
        self._wait()

    def _ask(self, folder: Folder, paths: Sequence[str], together: bool) -> Iterator[Footer | str]:
        """Answers in order, until all are there or the process has died."""
        left = len(paths)
        try:
            line = self._open()
            line.send((folder, list(paths), together))
            while left:
                answer = line.recv()
                left -= 1
                yield answer
        except (EOFError, ConnectionError):
            self._wait()
        finally:
            if left:
                # Nobody waits for what is still to come.
                self.close()

    def _open(self) -> Connection[Any, Any]:
        if self._line is None:
            ours, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    # What a runtime says when it aborts is for whoever debugs it; here one line tells of it.
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            self._line = ours
        return self._line

    def _wait(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._code = self._process.wait()
            self._process = None

    def _died(self) -> str:
        """By which signal.

        Raises:
            JobFailed: by none: it is not the file's doing.
        """
        if self._code >= 0:
            raise JobFailed(f"input: the process that reads footers ended with exit code {self._code}")
        return signal.Signals(-self._code).name


_READER = _Reader()
atexit.register(_READER.close)


def footers_apart(folder: Folder, paths: Sequence[str]) -> Iterator[Footer | str]:
    """As :func:`hycluster.batch.input.footers.footers`, in another process than this one."""
    return _READER.footers(folder, paths)


def answer_calls(descriptor: int) -> None:
    """What the process does: answer until nobody is at the other end any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    line: Connection[Any, Any] = Connection(descriptor)
    while True:
        try:
            folder, paths, together = line.recv()
        except EOFError:
            return
        answers = footers(folder, paths) if together else (footer_or_fault(folder, path) for path in paths)
        for answer in answers:
            line.send(answer)
