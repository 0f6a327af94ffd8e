"""A process's own file of the ledger: a line for each request, appended in one write; and those that others have left.

What a write has returned from is the kernel's, so the end of the process loses nothing of it. A file is its writer's as
long as that holds its lock (``flock``), which goes with the process, however it ends; then it is anybody's, to be
committed and deleted. While it is made it has another name: no lock is taken from a writer that has not got it yet.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hycluster.ledger.entry import Entry, entries_in

logger = logging.getLogger(__name__)

SUFFIX = ".jsonl"
# Lines that are held in memory while the disk takes none: some tens of MiB.
MOST_WAITING = 100_000


class UsageJournal:
    """What this process writes. ``append`` is called from the loop that answers, the rest from a thread beside it.

    Args:
        folder: for all processes of this machine; is made.

    Raises:
        OSError: nothing can be written there.

    Attributes:
        lost: lines that were given up because the disk took none for too long.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._said_full = False
        self.lost = 0
        self._descriptor = self._begin()
        self._size_bytes = 0
        self._since: float | None = None
        self._unsynced = False

    def append(self, line: bytes) -> None:
        """Never raises: what can't be written now is held in memory, and written as soon as it can be."""
        with self._lock:
            if self._since is None:
                self._since = time.time()
            if self._waiting or not self._write(line):
                self._wait(line)

    @property
    def since(self) -> float | None:
        """When the oldest line was written that is in the open file, in seconds since the epoch; None: it is empty."""
        return self._since

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def waiting(self) -> int:
        """Lines that could not be written yet."""
        return len(self._waiting)

    def retry(self) -> None:
        """Write what could not be written."""
        with self._lock:
            while self._waiting and self._write(self._waiting[0]):
                del self._waiting[0]

    def sync(self) -> None:
        """Force what is written to the disk."""
        if not self._unsynced:
            return
        with self._lock:
            descriptor = os.dup(self._descriptor)
            self._unsynced = False
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def cut(self) -> None:
        """Begin another file; the one until now is anybody's."""
        successor = self._begin()
        with self._lock:
            descriptor, self._descriptor = self._descriptor, successor
            self._size_bytes, self._since, self._unsynced = 0, time.time() if self._waiting else None, False
        _give_up(descriptor)

    def close(self) -> None:
        """Leave the file to be committed."""
        self.retry()
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        _give_up(descriptor)

    def _write(self, line: bytes) -> bool:
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            self._say(str(error))
            return False
        self._size_bytes += written
        self._unsynced = True
        if written < len(line):
            # What follows would be taken for the rest of it.
            self._say("the disk is full")
            with suppress(OSError):
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                return False
            os.write(self._descriptor, b"\n")
            return False
        self._said_full = False
        return True

    def _wait(self, line: bytes) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(line)
        else:
            self.lost += 1

    def _say(self, why: str) -> None:
        if not self._said_full:
            logger.error("ledger: can't be written, what is to be written is held in memory: %s", why)
        self._said_full = True

    def _begin(self) -> int:
        name = uuid.uuid4().hex
        new = self._folder / f".{name}"
        descriptor = os.open(new, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        new.rename(self._folder / f"{name}{SUFFIX}")
        return descriptor


def _give_up(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def taken(file: Path) -> Iterator[bytes | None]:
    """The content of a file whose writer has left it, which is nobody else's meanwhile; None: it is somebody's, or
    gone."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Another one may have committed and deleted it before the lock was had.
        if not os.fstat(descriptor).st_nlink:
            yield None
            return
        with open(descriptor, "rb", closefd=False) as stream:
            yield stream.read()
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    """Those of all processes of this machine, open or left."""
    try:
        return sorted(found for found in folder.iterdir() if found.suffix == SUFFIX)
    except FileNotFoundError:
        return []


def read_open(folder: Path) -> Iterator[tuple[str, list[Entry]]]:
    """By piece, what is not deleted yet, whoever has it."""
    for file in files_in(folder):
        with suppress(FileNotFoundError):
            yield file.stem, list(entries_in(file.read_bytes()))
