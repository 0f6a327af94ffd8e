from __future__ import annotations

import socket

import pytest

from hycluster.errors import SettingsError
from hycluster.ingress.ports import bind, check_port


def test_a_free_port_listens() -> None:
    with bind("127.0.0.1", 0, "http.port") as listening:
        port = listening.getsockname()[1]
        assert port > 0
        assert not listening.getblocking()
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            accepted, _ = listening.accept()
            accepted.close()


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0, "http.port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"^grpc\.port: {port} on 127\.0\.0\.1 can't be opened: .*in use"):
            check_port("127.0.0.1", port, "grpc.port")
    # And free again, though it was open a moment ago.
    check_port("127.0.0.1", port, "grpc.port")


def test_several_doors_share_a_port() -> None:
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
