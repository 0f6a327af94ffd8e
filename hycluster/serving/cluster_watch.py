"""Notices at once that Ray itself is lost under ``hycluster serve``, says so, and ends what is left of it.

Without its GCS a Ray cluster starts nothing and replaces nothing, and after a minute ends itself with lines that only
Ray's developers read. On one machine nothing brings a GCS back: Ray can do that only with a Redis outside. But ingress
processes and replicas talk to each other past Ray, so what callers have in work can end first. A supervisor starts all
of it anew (``deployments/hycluster.service``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from hycluster.aside import STDERR
from hycluster.errors import ClusterLost
from hycluster.serving import ray_state

# Ray ends its own processes at the end of its patience; until then there must be time to end what is left.
MARGIN_S = 10.0
LOOK_EVERY_S = 0.5
# A GCS that is joined may only have dropped this one connection.
REFUSED_FOR_S = 2.0
CONNECT_TIMEOUT_S = 2.0
# A machine that is gone says nothing: probes after so many seconds of silence, so often.
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S, KEEPALIVE_PROBES = 5, 2, 3


@dataclass(frozen=True, slots=True)
class RayProcesses:
    """What there is to watch.

    Attributes:
        address: of GCS.
        gcs: its pid, if this process started it.
        raylet: pid of the raylet that this process is connected to; None if that is not known.
    """

    address: str
    gcs: int | None
    raylet: int | None

    @property
    def own(self) -> bool:
        """This process started it, so it ends with this process."""
        return self.gcs is not None


def gcs_patience_s() -> float:
    """How long Ray's processes live without GCS."""
    return float(os.environ.get(ray_state.GCS_PATIENCE_VARIABLE) or ray_state.GCS_PATIENCE_S)


class ClusterWatch:
    """Watches until :meth:`close`, on threads of its own; whatever the main thread waits for.

    Args:
        say: prints a line.
        drain: has callers' work end, within so many seconds; called only where there is a way to.
        end: ends this process with an exit code.
        code: that exit code.
        advice: what is to be done then.
    """

    def __init__(
        self,
        ray: RayProcesses,
        say: Callable[[str], None],
        drain: Callable[[float], None],
        end: Callable[[int], Any] = os._exit,
        code: int = ClusterLost.exit_code,
        advice: str = "start it again",
    ) -> None:
        self._ray = ray
        self._say = say
        self._drain = drain
        self._end = end
        self._code = code
        self._advice = advice
        self._closed = threading.Event()
        self._once = threading.Lock()
        self._family: set[psutil.Process] = set()
        self._wake = os.eventfd(0)
        for watch in (self._watch_processes, *(() if ray.own else (self._watch_address,))):
            threading.Thread(target=watch, name="cluster watch", daemon=True).start()

    def close(self) -> None:
        """Watch no longer: Ray is about to end on purpose. Does not return if this process is being ended already."""
        self._closed.set()
        if not self._once.acquire(blocking=False):
            threading.Event().wait()
        os.eventfd_write(self._wake, 1)

    def remember(self) -> None:
        """Note which processes there are below this one: those of a raylet that has died have no parent to go by."""
        if self._ray.own:
            alive = {process for process in self._family if process.is_running()}
            self._family = alive | set(psutil.Process().children(recursive=True))

    # -- noticing -----------------------------------------------------------------------------------

    def _watch_processes(self) -> None:
        """Sleeps until one of them ends."""
        names = {"gcs_server": self._ray.gcs, "raylet": self._ray.raylet}
        by_fd: dict[int, str] = {}
        for name, pid in names.items():
            if pid is not None:
                try:
                    by_fd[os.pidfd_open(pid)] = name
                except ProcessLookupError:
                    self._lost(name)
        ended, _, _ = select.select([*by_fd, self._wake], [], [])
        # Of both, GCS is the one whose end explains the other's.
        for fd in sorted(set(ended) & by_fd.keys(), key=lambda fd: by_fd[fd]):
            self._lost(by_fd[fd])
            return

    def _watch_address(self) -> None:
        """GCS runs elsewhere: its end closes a connection, or answers no keep-alive."""
        host, _, port = self._ray.address.rpartition(":")
        connection = _connect(host, int(port))
        while not self._closed.is_set():
            connection = connection or self._wait_for_return(host, int(port))
            if connection is None:
                return
            with connection:
                self._wait_for_end(connection)
            connection = None if self._closed.is_set() else _connect(host, int(port))
        if connection is not None:
            connection.close()

    def _wait_for_end(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                select.select([connection.fileno(), self._wake], [], [])
                # What GCS sends to one who says nothing does not matter; its end does.
                if self._closed.is_set() or not connection.recv(1 << 12):
                    return

    def _wait_for_return(self, host: str, port: int) -> socket.socket | None:
        lost_s, said = time.monotonic(), False
        patience_s = max(REFUSED_FOR_S, gcs_patience_s() - MARGIN_S)
        while not self._closed.wait(LOOK_EVERY_S):
            away_s = time.monotonic() - lost_s
            if (connection := _connect(host, port)) is not None:
                if said:
                    self._say(f"back: Ray's GCS at {self._ray.address} after {away_s:.0f} s")
                return connection
            if away_s > REFUSED_FOR_S and not said:
                said = True
                self._say(
                    f"lost: Ray's GCS at {self._ray.address}; what runs serves on, nothing is replaced; this command"
                    f" waits for it for {patience_s:.0f} s"
                )
            if away_s > patience_s:
                self._lost("GCS")
                return None
        return None

    # -- the end ------------------------------------------------------------------------------------

    def _lost(self, name: str) -> None:
        if self._closed.is_set() or not self._once.acquire(blocking=False):
            return
        begun_s = time.monotonic()
        _quiet_ray()
        pid = {"gcs_server": self._ray.gcs, "raylet": self._ray.raylet}.get(name)
        which = f"Ray's {name} (pid {pid})" if pid else f"Ray's {name} at {self._ray.address}"
        if not self._ray.own:
            self._say(f"lost: {which}; this command ends, with exit code {self._code}; {self._advice}")
        elif name == "raylet":
            self._say(f"lost: {which}, and all replicas and ingress processes with it; this command ends")
        else:
            limit_s = max(1.0, gcs_patience_s() - MARGIN_S)
            self._say(
                f"lost: {which}; without it nothing is replaced, and on one machine nothing brings it back; requests"
                f" in flight have {limit_s:.0f} s at most to finish, then this command ends"
            )
            self.remember()
            self._try_to_drain(limit_s)
        if self._ray.own:
            self._stop_all()
        self._say(f"stopped after {time.monotonic() - begun_s:.1f} s; exit code {self._code}")
        self._end(self._code)

    def _try_to_drain(self, limit_s: float) -> None:
        # A thread, as Ray may keep whoever asks it.
        draining = threading.Thread(target=self._drain, args=(limit_s,), name="drain", daemon=True)
        draining.start()
        draining.join(limit_s)

    def _stop_all(self) -> None:
        self.remember()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._family, timeout=5)


def _quiet_ray() -> None:
    """Keep what Ray's C++ writes while Ray falls apart off the terminal: this module's words are to be read."""
    sys.stderr.flush()
    if sys.stderr.fileno() != STDERR:
        # Set aside already; a copy of that descriptor is Ray's log.
        return
    sys.stderr = os.fdopen(os.dup(STDERR), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), STDERR)


def _connect(host: str, port: int) -> socket.socket | None:
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
    except OSError:
        return None
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_EVERY_S),
        (socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection


def watched(address: str, *, own: bool) -> RayProcesses:
    """What this process is connected to."""
    if own:
        return RayProcesses(address, ray_state.own_process("gcs_server"), ray_state.own_process("raylet"))
    return RayProcesses(address, None, ray_state.raylet_here())
