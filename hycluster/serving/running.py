"""Which Ray clusters this ``HYCLUSTER_HOME`` has started and which of all there are a command acts on. Imports no Ray.

Ray itself joins whatever it finds on the machine, which may be anybody's. No command does: it takes the cluster that it
is told, or the one that ``hycluster serve`` started from the same home.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hycluster.errors import SettingsError, shown
from hycluster.settings.base import home

logger = logging.getLogger(__name__)

# Names that Ray itself knows: any cluster that it finds, or a new one.
_RAYS_OWN = ("auto", "local")


# A file is written in a moment.
_WRITING_S = 60.0
# Word of another machine's cluster that does not answer; it may be out of reach for a while.
_ELSEWHERE_S = 86400.0


@dataclass(frozen=True, slots=True)
class Started:
    """A Ray cluster that a process of this home started, and that ends with it.

    Attributes:
        begun: tells the process from a later one of the same number; see :func:`_begun`.
        since: seconds since the epoch.
        database: URL of the keys that its callers are asked for; None: they are not, or it holds a password.
        ledger: folder or URI of the usage ledger; empty: it is off; None: not known, or that holds a secret.
    """

    address: str
    pid: int
    begun: str
    host: str
    since: float
    models: tuple[str, ...] = ()
    database: str | None = None
    ledger: str | None = None

    def __str__(self) -> str:
        models = f" for {', '.join(self.models)}" if self.models else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"started by process {self.pid} of this machine at {when}{models}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The Ray cluster that a command acts on.

    Attributes:
        said_by: the option or variable that names it.
        started: what is known of it, if this home started it.
    """

    address: str
    said_by: str
    started: Started | None

    def __str__(self) -> str:
        return f"{self.address} ({self.started or f'named by {self.said_by}'})"


def remember(address: str) -> None:
    """Leave word of a cluster that this process has started, for other commands of this home."""
    tidy()
    _write(Started(address, os.getpid(), _begun(os.getpid()) or "", socket.gethostname(), time.time()))


def remember_service(models: Sequence[str], database: str | None, ledger: str | None = None) -> None:
    """Add what is served there, whom it lets in and where its ledger is; without effect if this process has started
    none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        _write(dataclasses.replace(_read(_file(os.getpid())), models=tuple(models), database=database, ledger=ledger))


def forget() -> None:
    """The cluster of this process ends."""
    with contextlib.suppress(OSError):
        _file(os.getpid()).unlink(missing_ok=True)


def tidy() -> None:
    """Remove word of clusters that are no more, and what a process left that was killed as it wrote."""
    started_here()
    for file in _folder().glob("*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            old_s = time.time() - file.stat().st_mtime
            written = file.suffix == ".json"
            if (not written and old_s > _WRITING_S) or (
                written and old_s > _ELSEWHERE_S and not _answers(_read(file).address)
            ):
                file.unlink()


def _answers(address: str) -> bool:
    """Whether somebody listens there; of a cluster on another machine no more is known here."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except (OSError, ValueError):
        return False
    return True


def started_here() -> list[Started]:
    """Clusters that this home started on this machine and whose process lives, the oldest first."""
    found = []
    for file in _folder().glob("*.json"):
        try:
            started = _read(file)
        except (OSError, ValueError, TypeError):
            file.unlink(missing_ok=True)
            continue
        if started.host != socket.gethostname():
            # A home that several machines see; what lives there is not known here.
            continue
        if _begun(started.pid) == started.begun:
            found.append(started)
        else:
            file.unlink(missing_ok=True)
    return sorted(found, key=lambda one: one.since)


def choose(address: str | None = None) -> Chosen:
    """The cluster at ``address`` (of ``--address``), in ``RAY_ADDRESS``, or the only one that this home has started.

    Raises:
        SettingsError: there is none, or more than one.
    """
    started = started_here()
    for said_by, named in (("--address", address), ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))):
        if named:
            if named in _RAYS_OWN:
                raise SettingsError(
                    f"{said_by}: {shown(named)} is not allowed, it could be anybody's cluster; must be HOST:PORT"
                )
            return Chosen(named, said_by, next((one for one in started if one.address == named), None))
    if not started:
        raise SettingsError(
            "--address: no cluster was named, and no running one was started from this HYCLUSTER_HOME"
            f" ({home()}); give --address HOST:PORT or RAY_ADDRESS, or start one with 'hycluster serve'"
        )
    if len(started) > 1:
        listed = "\n".join(f"  {one.address} {one}" for one in started)
        raise SettingsError(
            f"--address: {len(started)} running clusters were started from this HYCLUSTER_HOME ({home()}); give"
            f" --address with one of them:\n{listed}"
        )
    return Chosen(started[0].address, "this HYCLUSTER_HOME", started[0])


def _folder() -> Path:
    """A file for each cluster that was started."""
    return home() / "state" / "clusters"


def _file(pid: int) -> Path:
    # Containers on one home have the same numbers.
    return _folder() / f"{socket.gethostname()}-{pid}.json"


def _read(file: Path) -> Started:
    """Raises OSError, ValueError, TypeError: it is gone, or no such file."""
    found = Started(**json.loads(file.read_text(encoding="utf-8")))
    return dataclasses.replace(found, models=tuple(found.models))


def _write(started: Started) -> None:
    file = _file(started.pid)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(".tmp")
        written.write_text(json.dumps(dataclasses.asdict(started)), encoding="utf-8")
        written.replace(file)
    except OSError as error:
        logger.warning("other commands will not find this cluster by itself, give them --address: %s", error)


def _begun(pid: int) -> str | None:
    """Which process has this number: when it began, in the kernel's own count; None if none lives.

    Numbers are given again; no clock that is set moves this. Where there is no /proc, the number has to do.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return None if state in "ZX" else f"{boot} {rest[18]}"
    except OSError:
        if Path("/proc/self").exists():
            return None
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return ""
