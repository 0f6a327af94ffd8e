from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.ingress import ports
from hycluster.ingress.ports import TURNED_AWAY_AFTER_S, bind, check_port, let_in, turn_away
from tests.ordinary_user import as_ordinary_user
from tests.waiting import PATIENCE_S


def test_a_free_port_listens() -> None:
    with bind("127.0.0.1", 0, "http.port") as listening:
        port = listening.getsockname()[1]
        assert port > 0
        assert not listening.getblocking()
        with dialled(port):
            accepted, _ = listening.accept()
            accepted.close()


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0, "http.port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"^grpc\.port: {port} on 127\.0\.0\.1 can't be opened: .*in use"):
            check_port("127.0.0.1", port, "grpc.port")
    # And free again, though it was open a moment ago.
    check_port("127.0.0.1", port, "grpc.port")


def test_several_ingress_processes_share_a_port() -> None:
    with bind("127.0.0.1", 0, "http.port", reuse_port=True) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port, "http.port", reuse_port=True) as second:
            assert second.getsockname()[1] == port
        with pytest.raises(SettingsError, match="in use"):
            bind("127.0.0.1", port, "http.port")


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    with pytest.raises(SettingsError, match=rf"^http\.port: 8000 on {host} can't be opened"):
        check_port(host, 8000, "http.port")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel is not told")
def test_who_is_turned_away_reaches_the_other_ingress_process() -> None:
    with bind("127.0.0.1", 0, "http.port", reuse_port=True) as going:
        port = going.getsockname()[1]
        with bind("127.0.0.1", port, "http.port", reuse_port=True) as coming, contextlib.ExitStack() as stack:
            kept = [stack.enter_context(dialled(port)) for _ in range(30)]
            before = accepted(going, stack)
            accepted(coming, stack)
            # By chance all 30 may have gone to one of the two: once in half a billion times.
            assert 0 < before < len(kept)
            turn_away(port)
            # Both are this process', so nobody is let in but who tries again once the port is listened on anew.
            with ThreadPoolExecutor(20) as pool:
                calls = [pool.submit(lambda: stack.enter_context(dialled(port))) for _ in range(20)]
                time.sleep(TURNED_AWAY_AFTER_S)
                assert (accepted(going, stack), accepted(coming, stack)) == (0, 0)
                going.close()
                coming.close()
                with bind("127.0.0.1", port, "http.port", reuse_port=True) as successor:
                    connections = [call.result() for call in calls]
                    assert accepted(successor, stack) == len(connections) == 20


def test_connections_that_there_are_stay() -> None:
    with bind("127.0.0.1", 0, "http.port", reuse_port=True) as ingress:
        port = ingress.getsockname()[1]
        with dialled(port) as caller:
            inside, _ = ingress.accept()
            with inside:
                turn_away(port)
                caller.sendall(b"ask")
                inside.settimeout(PATIENCE_S)
                assert inside.recv(3) == b"ask"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel is not told")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_who_was_half_open_is_heard(host: str) -> None:
    """To the kernel that one is what the socket says by then: none of its packets would count."""
    with bind(host, 0, "http.port", reuse_port=True) as ingress:
        port = ingress.getsockname()[1]
        # Half open until its first word, which comes after the ingress process has begun to leave.
        ingress.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
        with dialled(port, host) as caller:
            with pytest.raises(BlockingIOError):
                ingress.accept()
            turn_away(port)
            caller.sendall(b"ask")
            inside, _ = await asyncio.to_thread(patiently_accepted, ingress)
            with inside:
                assert inside.recv(3) == b"ask"
                caller.sendall(b"more")
                inside.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    inside.recv(4)
                await let_in([port], TURNED_AWAY_AFTER_S)
                inside.settimeout(PATIENCE_S)
                assert inside.recv(4) == b"more"


def patiently_accepted(ingress: socket.socket) -> tuple[socket.socket, Any]:
    ingress.settimeout(PATIENCE_S)
    return ingress.accept()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel is not told")
def test_a_kernel_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(sock: socket.socket, least: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(ports, "_ask_for_hops", refuse)
    with bind("127.0.0.1", 0, "http.port", reuse_port=True) as ingress:
        port = ingress.getsockname()[1]
        turn_away(port)
    assert f"ports ({port},) are left without a word to the kernel: [Errno 1]" in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="it is one already")
def test_an_ordinary_user_may_do_all_of_it() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(as_ordinary_user(command), check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout


def dialled(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=PATIENCE_S)


def accepted(ingress: socket.socket, stack: contextlib.ExitStack) -> int:
    """How many connections wait there; they stay open."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            stack.enter_context(ingress.accept()[0])
            count += 1
    return count
