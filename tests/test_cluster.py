from __future__ import annotations

import inspect
import os
import socket
import socketserver
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from hycluster import cluster
from hycluster.aside import RAYS_THREAD
from hycluster.client import SERVICE
from hycluster.errors import SettingsError
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def _not_joined_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this session may have left a Ray cluster running in this process."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(SettingsError, match=rf"^--address: no Ray cluster at '127\.0\.0\.1:{port}': .*refused"):
        cluster.join_cluster(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", "http://127.0.0.1:8265", "head:"])
def test_what_is_no_gcs_address_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Ray Client's took half a minute and a warning of its own."""
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(SettingsError, match=f"^--address: no Ray cluster at '{address}': must be HOST:PORT"):
        cluster.join_cluster(address)


class Says(socketserver.BaseRequestHandler):
    """An HTTP ingress, as far as it is needed."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def test_an_ingress_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tried to talk to it for minutes."""
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Says) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        address = "127.0.0.1:{1}".format(*http.server_address)
        with pytest.raises(SettingsError, match=rf"^--address: no Ray cluster at '{address}': .* is no GCS"):
            cluster.join_cluster(address)
        http.shutdown()
    server = grpc.server(ThreadPoolExecutor(1))
    health = HealthServicer()
    health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(SettingsError, match=r"^--address: no Ray cluster at '\S+': a gRPC ingress of hycluster"):
            cluster.join_cluster(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_what_may_be_a_cluster_is_left_to_ray() -> None:
    """A GCS has not this service; one that is busy says nothing in time."""
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        cluster._check_kind(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_rays_notices_are_kept_off_the_terminal_whatever_is_imported_when() -> None:
    """Serve, imported by then, said at 'hycluster status' that it had started a client for long polls."""
    code = """
import logging
from hycluster import cluster
cluster._quiet()
from ray import serve
for name in ("ray", "ray.serve"):
    for level in (20, 40):
        logging.getLogger(name).log(level, f"{name} {level}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    said = done.stdout + done.stderr
    assert [f"{name} {level}" in said for name in ("ray", "ray.serve") for level in (20, 40)] == [False, True] * 2


@pytest.mark.parametrize(("timeouts", "starts"), [(0, 1), (2, 3)])
def test_ray_may_take_longer_than_it_gives_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, timeouts: int, starts: int
) -> None:
    begun = []

    def init(**_: object) -> None:
        begun.append(subprocess.Popen(["sleep", "100"]))
        if len(begun) <= timeouts:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    cluster._start_node()
    assert len(begun) == starts
    assert len(caplog.records) == timeouts
    # What a start that failed has left is gone; what serves is not.
    for process in begun[:-1]:
        assert process.wait(PATIENCE_S) < 0
    assert begun[-1].poll() is None
    begun[-1].kill()
    begun[-1].wait()


def test_what_else_keeps_ray_from_starting_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def init(**_: object) -> None:
        begun.append(1)
        raise ValueError("no")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="no"):
        cluster._start_node()
    assert begun == [1]


def test_a_token_is_asked_for_as_ray_does_by_itself() -> None:
    """Ray does it for a cluster that it starts, and for one that is named it still does not."""
    from ray._private import worker

    script = (
        "import os; from ray._private.authentication import authentication_token_setup as setup\n"
        "setup.enable_token_auth_by_default(); print(os.environ['RAY_AUTH_MODE'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.split() == ["token"]
    joining = inspect.getsource(worker.init).partition("if bootstrap_address is None:")
    assert "enable_token_auth_by_default()" in joining[2]
    assert joining[2].count("enable_token_auth_by_default") == 1
    assert "enable_token_auth_by_default" not in joining[0]


def test_the_thread_that_prints_has_its_name() -> None:
    """Ray 2.60.0; hycluster/aside.py knows it by that name."""
    source = inspect.getsource(ray._private.worker)
    assert f'name="{RAYS_THREAD}"' in source


def test_what_is_kept_is_for_nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before Ray starts: its token, and the home with all that it holds."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path / "state" / "home"))
    token = tmp_path / ".ray" / "auth_token"
    modes: list[int] = []

    def start() -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in (tmp_path / "state" / "home", token))
        raise InterruptedError

    def make(**_: object) -> None:
        token.parent.mkdir(exist_ok=True)
        token.write_text("secret")

    monkeypatch.setattr(cluster, "enable_token_auth_by_default", lambda: None)
    monkeypatch.setattr(cluster, "ensure_token_if_auth_enabled", make)
    monkeypatch.setattr(cluster, "_start_node", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            cluster.start()
        # As they are from before.
        token.chmod(0o644)
        (tmp_path / "state" / "home").chmod(0o755)
    assert modes == [0o700, 0o600] * 2
