"""One coordinator an output: a lease that its holder renews, in files ``_coordinator/<n>.json``.

The file with the highest number is the lease. It is taken by creating the next number, which is
atomic (``WritableFolder.create``), so of many that find a dead holder one succeeds it. Clocks of
different machines are never compared: a holder on another machine counts as dead once its file has
not changed for ``expire_s`` by the clock of the one who watches; one on this machine as soon as its
process is gone.

The lease saves work and says who is at it. That no row comes twice does not hang on it: a
holder that was stopped and wakes up after its lease was taken over meets the shard records.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hycluster.errors import JobFailed
from hycluster.storage import Folder, WritableFolder, leftover_of

FOLDER = "_coordinator"
RENEW_S = 5.0
EXPIRE_S = 30.0


class Lease:
    """The right to coordinate an output, given back when the ``with`` block ends.

    Args:
        output: its folder.
        renew_s: seconds between two renewals; ``expire_s`` must be several times that.
    """

    def __init__(self, output: WritableFolder, *, renew_s: float = RENEW_S, expire_s: float = EXPIRE_S) -> None:
        self._path = output.masked
        self._folder = output.below(FOLDER)
        self._renew_s = renew_s
        self._expire_s = expire_s
        self._number = 0
        self._known_dead: bytes | None = None
        self._card = {**_this_process(), "since": time.time(), "token": uuid.uuid4().hex}
        self._successor: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="batch-lease", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewer.ident is None:
            return
        self._stop.set()
        self._renewer.join()
        # From the top down: whoever looks in between finds the dead ones that were there before.
        mine = [number for number in self._numbers() if number <= self._number]
        self._folder.delete(_name(number) for number in sorted(mine, reverse=True))
        self._folder.delete([name for name in self._folder.names() if leftover_of(name)])

    @property
    def held(self) -> bool:
        """Whether this process has it, and nobody has taken over."""
        return self._renewer.ident is not None and self._successor is None

    def look(self) -> None:
        """Return if nobody holds the lease; may watch a silent holder for ``expire_s``. Writes nothing.

        Raises:
            JobFailed: names the holder.
        """
        number = max(self._numbers(), default=0)
        if number:
            self._refuse_living(number)

    def take(self) -> None:
        """Take the lease and keep it until the block ends.

        Raises:
            JobFailed: another process holds it; names it.
            OSError: the output can't be written.
        """
        self._folder.make()
        while True:
            number = max(self._numbers(), default=0)
            if number:
                self._refuse_living(number)
            self._number = number + 1
            self._folder.create(_name(self._number), self._content(0))
            # What it answered may be wrong, see there; what is in the file is not.
            if self._holder(self._number).get("token") == self._card["token"]:
                break
        self._renewer.start()

    def check(self) -> None:
        """Raise JobFailed if the lease was lost: this process was not heard of for too long."""
        if self._successor is not None:
            raise JobFailed(f"output.path: {self._path!r} was taken over by {_named(self._successor)}; this run stops")

    def renew(self) -> None:
        """Show that this process lives, and see whether another has taken over."""
        later = [number for number in self._numbers() if number > self._number]
        if later:
            self._successor = self._holder(max(later))

    def _renew(self) -> None:
        renewals = 0
        while self._successor is None and not self._stop.wait(self._renew_s):
            renewals += 1
            try:
                self.renew()
                if self._successor is None:
                    self._folder.replace(_name(self._number), self._content(renewals))
            except OSError:
                # The store is away for a moment; the next round tries again, until others think us dead.
                continue

    def _refuse_living(self, number: int) -> None:
        content = self._read(number)
        if content is None or content == self._known_dead:
            return
        holder = _parsed(content)
        here = _this_process()["machine"]
        if here is not None and holder.get("machine") == here:
            alive = _started(holder["pid"]) == holder["started"]
        else:
            alive = self._changes(number, content)
        if alive:
            raise JobFailed(f"output.path: {self._path!r} is being written by {_named(holder)}; wait for it or stop it")
        self._known_dead = content

    def _changes(self, number: int, content: bytes) -> bool:
        give_up_s = time.monotonic() + self._expire_s
        while time.monotonic() < give_up_s:
            time.sleep(min(1.0, self._expire_s / 10))
            now = self._read(number)
            if now is None:
                return False
            if now != content:
                return True
        return False

    def _numbers(self) -> list[int]:
        return [int(name.removesuffix(".json")) for name in self._folder.names() if leftover_of(name) is None]

    def _holder(self, number: int) -> dict[str, Any]:
        content = self._read(number)
        return _parsed(content) if content else {}

    def _read(self, number: int) -> bytes | None:
        return self._folder.read_whole(_name(number))

    def _content(self, renewals: int) -> bytes:
        return json.dumps({**self._card, "renewals": renewals}).encode()


def holder_has_died(output: Folder) -> bool:
    """Whether the lease is that of a process of this machine which is gone; of others that takes watching."""
    folder = output.below(FOLDER)
    try:
        held = max((name for name in folder.names() if leftover_of(name) is None), default=None)
        holder = (folder.read_json(held) if held else None) or {}
    except (OSError, ValueError):
        return False
    here = _machine()
    if here is None or holder.get("machine") != here:
        return False
    return bool(_started(holder["pid"]) != holder["started"])


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(content)
    except ValueError:
        # A power cut may leave an empty file; nobody renews it, so it is watched and found dead.
        return {}
    return holder


def _named(holder: dict[str, Any]) -> str:
    since = datetime.fromtimestamp(holder.get("since", 0), UTC)
    return (
        f"another run (host {holder.get('host', '?')}, pid {holder.get('pid', '?')}, "
        f"since {since:%Y-%m-%d %H:%M:%S} UTC)"
    )


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _started(pid)}


def _machine() -> str | None:
    """What processes have in common that can see each other by pid; None where there is no way to tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot: tells it from a later one with its pid. None if it is gone."""
    try:
        # The second field is the program's name in brackets and may hold anything.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]
