"""What Ray says for itself goes to a file, so that a command's terminal has the command's own words alone.

Ray's C++ writes straight to standard error's file descriptor: warnings about tokens, a stack trace for each SIGTERM and
Ctrl-C. A thread of its Python prints other processes' errors to standard output. A command that joins a cluster gives
both to a log, whose place it tells; its own lines go to a copy of the descriptor.

Pinned to Ray 2.60.0: the name of that thread.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from hycluster.settings.base import home, private_home

# In ``ray/_private/worker.py``.
RAYS_THREAD = "ray_listen_error_messages"
# Logs of commands that ended longer ago go.
KEPT_S = 7 * 86400.0
STDERR = 2

# Of a command that has not come to Ray yet.
_tell: list[Callable[[str], None]] = []
_later: list[str] = []


def in_a_command(tell: Callable[[str], None], *, quick: bool = False) -> None:
    """This process is a command: if it comes to Ray, Ray's words are to be set aside.

    Args:
        tell: is called with the log's place.
        quick: it only looks at something: the log's place is told by :func:`tell_place`, if it fails.
    """
    _tell[:] = [_later.append if quick else tell]


def tell_place(tell: Callable[[str], None]) -> None:
    """Say where Ray's words are, if there are any and nobody has said so."""
    while _later:
        tell(_later.pop())


def set_aside() -> None:
    """From now on what is written past Python to standard error goes to a log; does nothing but in a command.

    Nor where a caller within this process has put something else in standard error's place.
    """
    if not _tell or not _is_standard(sys.stderr):
        return
    tell = _tell.pop()
    path = logs_folder() / f"ray-{os.getpid()}.log"
    try:
        private_home()
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        log = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        tell(f"what Ray says for itself comes here, its log can't be written: {error}")
        return
    own, before = _own_stderr(), sys.stderr
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(own)
    sys.stderr = own
    sys.stdout = cast(TextIO, _WithoutRays(sys.stdout, log))
    os.dup2(log.fileno(), STDERR)
    tell(f"what Ray says for itself: {path}")


def logs_folder() -> Path:
    return home() / "state" / "logs"


def _is_standard(stream: TextIO) -> bool:
    try:
        return stream.fileno() == STDERR
    except OSError:
        # In memory.
        return False


def _own_stderr() -> TextIO:
    """Standard error as it is now, by a descriptor that nobody else knows."""
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    return os.fdopen(os.dup(STDERR), "w", buffering=1, encoding=encoding, errors=errors)


def _sweep(folder: Path) -> None:
    for log in folder.glob("ray-*.log"):
        number = log.stem.rpartition("-")[2]
        if not Path(f"/proc/{number}").exists() and time.time() - log.stat().st_mtime > KEPT_S:
            log.unlink(missing_ok=True)


class _WithoutRays:
    """Standard output, but for what Ray's thread prints."""

    def __init__(self, stdout: TextIO, log: TextIO) -> None:
        self._stdout, self._log = stdout, log

    def write(self, text: str) -> int:
        return (self._log if threading.current_thread().name == RAYS_THREAD else self._stdout).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)
