"""A port that is held shut for a while."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import zmq

from hycluster.replica import listener as listener_module
from hycluster.replica.listener import Listener
from hycluster.settings.load import DataPlane
from tests.waiting import PATIENCE_S


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as made:
        yield made


def port(listener: Listener) -> int:
    return int(listener.endpoint.rpartition(":")[2])


@pytest.mark.parametrize("option", ["md5", "hops"])
def test_nobody_comes_in_while_it_is_shut_and_who_is_in_stays(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    if option == "hops":
        # As on a kernel without the other one.
        monkeypatch.setattr(listener_module, "_TCP_MD5SIG_EXT", 999)
    with context.socket(zmq.ROUTER) as sock, context.socket(zmq.DEALER) as peer:
        listener = Listener(sock, "127.0.0.1", DataPlane())
        peer.connect(listener.endpoint)
        peer.send(b"in")
        assert sock.recv_multipart()[1] == b"in"
        for _ in range(2):
            listener.let_in(False)
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", port(listener)), timeout=0.3)
        peer.send(b"still")
        assert sock.recv_multipart()[1] == b"still"
        for _ in range(2):
            listener.let_in(True)
        socket.create_connection(("127.0.0.1", port(listener)), timeout=PATIENCE_S).close()
        listener.close()


def test_a_closed_one_listens_no_more(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    sock = context.socket(zmq.ROUTER)
    listener = Listener(sock, "127.0.0.1", DataPlane())
    sock.close()
    listener.close()
    listener.let_in(False)
    context.term()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port(listener)), timeout=PATIENCE_S)


def test_a_kernel_that_has_neither_serves_and_says_so(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for option in ("_TCP_MD5SIG_EXT", "_IP_MINTTL"):
        monkeypatch.setattr(listener_module, option, 999)
    with context.socket(zmq.ROUTER) as sock:
        listener = Listener(sock, "127.0.0.1", DataPlane())
        for _ in range(3):
            listener.let_in(False)
        socket.create_connection(("127.0.0.1", port(listener)), timeout=PATIENCE_S).close()
        listener.close()
    (line,) = caplog.messages
    assert "can't be held off here" in line
