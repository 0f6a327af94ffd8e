"""Sockets that an ingress process listens on, and how an ingress process leaves a port that its successor listens on as
well.

With ``SO_REUSEPORT`` the kernel deals new connections out to all who listen. What it has dealt to one that closes
before it has accepted them is reset, so an ingress process first has the kernel deal it no more (:func:`turn_away`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterator

from hycluster.errors import SettingsError

logger = logging.getLogger(__name__)


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


def notice_lost_callers(sock: socket.socket, after_s: float) -> None:
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


# Linux' number for it; Python's ``socket`` has no name for it (``IPV6_MINHOPCOUNT`` is its counterpart).
_IP_MINTTL, _IPV6_MINHOPCOUNT = 21, 73
# Above what packets come with: senders begin at 64 or 128. One that begins at 255 is let in, as if nobody left.
_NONE_REACHES = 255
# What was under way when the kernel was told has arrived after this time, and been accepted.
TURNED_AWAY_AFTER_S = 0.3
# A packet that was dropped is sent again after 0.2 s, then after twice that.
_LET_IN_EVERY_S = 0.1


def turn_away(*ports: int) -> None:
    """Have the kernel give this process no new connections at these ports; those that there are stay.

    A caller whose first packet is dropped sends it again after a second. By then this process is to listen no more:
    whoever else does gets it. What was half open becomes a connection that hears nothing until :func:`let_in`.

    It asks for packets with more hops left than any has, which every user may. A filter on the socket would do as well,
    but takes CAP_NET_ADMIN; a program for all sockets that share the port (``SO_ATTACH_REUSEPORT_CBPF``) takes no
    right, but knows them by places that change whenever one closes.

    Where the kernel can't do it, it stays as it was: callers who come while the ingress process closes may be reset.
    """
    if sys.platform != "linux":
        return
    try:
        for sock, _ in _sockets(ports, listening=True):
            _ask_for_hops(sock, _NONE_REACHES)
    except OSError as error:
        logger.warning("ports %s are left without a word to the kernel: %s", ports, error)


async def let_in(ports: Collection[int], for_s: float) -> None:
    """For so long, hear those who were half open when they were turned away: they have it from the listening socket."""
    if sys.platform != "linux":
        return
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        await asyncio.sleep(_LET_IN_EVERY_S)
        # An ingress process may have thousands of connections to look at.
        await asyncio.to_thread(_let_in, ports)


def _let_in(ports: Collection[int]) -> None:
    # A process without free file descriptors drains all the same.
    with contextlib.suppress(OSError):
        for sock, wanted in _sockets(ports, listening=False):
            if wanted:
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    _ask_for_hops(sock, 0)


def _ask_for_hops(sock: socket.socket, least: int) -> None:
    sock.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, least)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, least)


def _sockets(ports: Collection[int], *, listening: bool) -> Iterator[tuple[socket.socket, int]]:
    """This process' sockets at these ports, gRPC's own too, which it shows nobody; and the hops that they ask for."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if (
                    sock.family in (socket.AF_INET, socket.AF_INET6)
                    and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is listening
                    and sock.getsockname()[1] in ports
                ):
                    yield sock, sock.getsockopt(socket.IPPROTO_IP, _IP_MINTTL)
