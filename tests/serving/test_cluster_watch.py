"""Ray's loss under ``hycluster serve``: noticed at once, said, and ended. Stand-ins for Ray: ``sleep``, and a port."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from hycluster.serving import cluster_watch
from hycluster.serving.cluster_watch import ClusterWatch, RayProcesses, gcs_patience_s
from tests.waiting import PATIENCE_S, eventually

EXIT_CODE = 4


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_watch, "_quiet_ray", lambda: None)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A GCS, a raylet and a worker: stand-ins."""
    started = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


class Ended:
    """What a watch says and does, instead of ending this process."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.drained: list[float] = []
        self.code: queue.Queue[int] = queue.Queue()

    def drain(self, limit_s: float) -> None:
        self.drained.append(limit_s)

    def watch(self, ray: RayProcesses) -> ClusterWatch:
        return ClusterWatch(ray, self.lines.append, self.drain, self.code.put)


def only(watch: ClusterWatch, monkeypatch: pytest.MonkeyPatch, children: list[subprocess.Popen[bytes]]) -> None:
    """Other tests' processes are none of its business."""
    monkeypatch.setattr(watch, "remember", lambda: None)
    watch._family = {psutil.Process(child.pid) for child in children}


def test_gcs_dies(children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    gcs, raylet, worker = children
    ended = Ended()
    only(ended.watch(RayProcesses("127.0.0.1:1", gcs.pid, raylet.pid)), monkeypatch, children)
    gcs.kill()
    assert ended.code.get(timeout=PATIENCE_S) == EXIT_CODE
    assert ended.drained == [gcs_patience_s() - cluster_watch.MARGIN_S]
    assert ended.lines[0].startswith(f"lost: Ray's gcs_server (pid {gcs.pid}); without it nothing is replaced")
    assert ended.lines[-1].endswith("exit code 4")
    assert not psutil.pid_exists(raylet.pid)
    assert not psutil.pid_exists(worker.pid)


def test_the_raylet_dies(children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    gcs, raylet, worker = children
    ended = Ended()
    only(ended.watch(RayProcesses("127.0.0.1:1", gcs.pid, raylet.pid)), monkeypatch, children)
    raylet.kill()
    assert ended.code.get(timeout=PATIENCE_S) == EXIT_CODE
    assert ended.lines[0] == (
        f"lost: Ray's raylet (pid {raylet.pid}), and all replicas and ingress processes with it; this command ends"
    )
    # Nothing is left that could end its work.
    assert ended.drained == []
    assert not psutil.pid_exists(gcs.pid)
    assert not psutil.pid_exists(worker.pid)


def test_a_drain_that_does_not_end_holds_nothing_up(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "11")
    ended = Ended()
    monkeypatch.setattr(ended, "drain", lambda _: time.sleep(600))
    only(ended.watch(RayProcesses("127.0.0.1:1", children[0].pid, None)), monkeypatch, children)
    begun = time.monotonic()
    children[0].kill()
    assert ended.code.get(timeout=PATIENCE_S) == EXIT_CODE
    assert time.monotonic() - begun >= 1


def test_what_ends_on_purpose_is_no_loss(children: list[subprocess.Popen[bytes]]) -> None:
    ended = Ended()
    watch = ended.watch(RayProcesses("127.0.0.1:1", children[0].pid, children[1].pid))
    watch.close()
    children[0].kill()
    with pytest.raises(queue.Empty):
        ended.code.get(timeout=1)
    assert ended.lines == []


class Port:
    """Stand-in for a GCS elsewhere: takes connections, can go and come back."""

    def __init__(self, number: int = 0) -> None:
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", number))
        self.number = self._server.getsockname()[1]
        self._taking = threading.Thread(target=self._take, daemon=True)
        self._taking.start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                self._open.append(self._server.accept()[0])

    def drop(self) -> None:
        for connection in self._open:
            connection.close()

    def close(self) -> None:
        # Or the thread that waits in it keeps it listening.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        # What it has just taken would stay open.
        self._taking.join()
        self.drop()


def test_a_cluster_that_was_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "12")
    monkeypatch.setattr(cluster_watch, "REFUSED_FOR_S", 0.3)
    monkeypatch.setattr(cluster_watch, "LOOK_EVERY_S", 0.1)
    ended = Ended()
    port = Port()
    watch = ended.watch(RayProcesses(f"127.0.0.1:{port.number}", None, None))
    time.sleep(0.3)
    # One connection more or less is nothing.
    port.drop()
    time.sleep(1)
    assert ended.lines == []
    port.close()
    eventually(lambda: ended.lines)
    (lost,) = ended.lines
    assert lost.startswith(f"lost: Ray's GCS at 127.0.0.1:{port.number}; what runs serves on")
    port = Port(port.number)
    eventually(lambda: len(ended.lines) > 1)
    assert ended.lines[1].startswith("back: Ray's GCS at ")
    assert not ended.code.qsize()
    port.close()
    assert ended.code.get(timeout=PATIENCE_S) == EXIT_CODE
    assert "exit code 4; start it again" in ended.lines[-2]
    del watch


def test_other_processes_are_left_alone(children: list[subprocess.Popen[bytes]]) -> None:
    """What a watch ends is what is below its own process, or was."""
    ended = Ended()
    watch = ended.watch(RayProcesses("127.0.0.1:1", children[0].pid, None))
    watch.remember()
    family = {process.pid for process in watch._family}
    watch.close()
    assert {child.pid for child in children} <= family
    assert os.getpid() not in family
    assert os.getppid() not in family


def test_no_connection_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []
    connect = cluster_watch._connect

    def connected(host: str, port: int) -> socket.socket | None:
        if (connection := connect(host, port)) is not None:
            made.append(connection)
        return connection

    monkeypatch.setattr(cluster_watch, "_connect", connected)
    with socket.create_server(("127.0.0.1", 0)) as gcs:
        address = f"127.0.0.1:{gcs.getsockname()[1]}"
        before = {*threading.enumerate()}
        watch = ClusterWatch(RayProcesses(address, None, None), lambda _: None, lambda _: None)
        watching = {*threading.enumerate()} - before
        while not made:
            time.sleep(0.01)
        watch.close()
        for thread in watching:
            thread.join(PATIENCE_S)
    assert [connection.fileno() for connection in made] == [-1] * len(made)
