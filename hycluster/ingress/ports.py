"""Sockets that a door listens on."""

from __future__ import annotations

import contextlib
import socket

from hycluster.errors import SettingsError


def bind(host: str, port: int, field: str, *, reuse_port: bool = False) -> socket.socket:
    """A listening TCP socket.

    Raises:
        SettingsError: the address is not to be had; names the field.
    """
    with contextlib.ExitStack() as undo:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, port))
            sock.listen(2048)
        except OSError as error:
            raise SettingsError(f"{field}: {port} on {host} can't be opened: {error.strerror or error}") from None
        sock.setblocking(False)
        undo.pop_all()
    return sock


def check_port(host: str, port: int, field: str) -> None:
    """Find out early that a port is taken.

    Raises:
        SettingsError: it is.
    """
    bind(host, port, field).close()
