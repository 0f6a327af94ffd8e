"""Sockets that a door listens on, and how a door leaves a port that its successor listens on as well.

With ``SO_REUSEPORT`` the kernel deals new connections out to all who listen. What it has dealt to one that closes
before it has accepted them is reset, so a door first has the kernel deal it no more (:func:`turn_away`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

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


def notice_lost(sock: socket.socket, after_s: float) -> None:
    """Have the kernel end connections whose other machine is gone without a word; for those that ``sock`` accepts.

    Of one with nothing on its way the kernel asks; of one with something on its way, or with a caller who leaves no
    room for more, it waits for an answer for so long. What sits in the kernel's buffers no protocol can see.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", max(1, int(after_s / 2))),
        ("TCP_KEEPINTVL", max(1, int(after_s / 8))),
        ("TCP_USER_TIMEOUT", int(after_s * 1000)),
    ):
        # Linux has all three.
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def check_port(host: str, port: int, field: str) -> None:
    """Find out early that a port is taken.

    Raises:
        SettingsError: it is.
    """
    bind(host, port, field).close()


# Linux' number for it; Python's ``socket`` has no name for it.
_SO_ATTACH_FILTER = 26
# Classic BPF on the TCP header, an instruction a line (code, jump if true, if false, operand): load the flags; with
# SYN among them keep nothing of the packet, else all.
_NO_SYN = [(0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]
# What was under way when the kernel was told has arrived after this time, and been accepted.
TURNED_AWAY_AFTER_S = 0.3


def turn_away(port: int) -> None:
    """Have the kernel give this process no new connections at a port; those that there are stay.

    A caller whose first packet is dropped sends it again after a second. By then this process is to listen no more:
    whoever else does gets it. Does nothing where the kernel can't do it.
    """
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _NO_SYN)
    kept = ctypes.create_string_buffer(program, len(program))
    for sock in _listening(port):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(_NO_SYN), ctypes.addressof(kept)))


def _listening(port: int) -> Iterator[socket.socket]:
    """This process' sockets that listen there, gRPC's own too, which it shows nobody."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if (
                    sock.family in (socket.AF_INET, socket.AF_INET6)
                    and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    and sock.getsockname()[1] == port
                ):
                    yield sock
