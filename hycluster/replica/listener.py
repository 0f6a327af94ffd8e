"""The port that a ZMQ socket listens at, made here and not by libzmq, so that it can be held shut for a while.

libzmq accepts whoever comes, and has no bound for it. While the port asks for packets that are signed by a key that
nobody has (TCP's MD5 option, of RFC 2385), the kernel drops whatever would open a connection; those that there are stay
as they are, and who wants to connect meanwhile is not refused, but tried again by its own kernel. A packet filter would
do as well, but takes CAP_NET_ADMIN.
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
import struct
import threading

import zmq

from hycluster.errors import SettingsError
from hycluster.settings.load import DataPlane

logger = logging.getLogger(__name__)

# Linux's numbers, which Python has no names for.
_TCP_MD5SIG_EXT, _PREFIX, _IP_MINTTL = 32, 1, 21
# What packets don't come with: senders begin at 64 or 128. For kernels without the option, and less sure than it: who
# begins at 255 is let in.
_NONE_REACHES = 255
_KEY = secrets.token_bytes(32)
# Connections that the kernel keeps until libzmq takes them.
_BACKLOG = 128


class Listener:
    """Listens for one ZMQ socket. Its methods may be called from any thread.

    Args:
        sock: bound to the port by this.

    Attributes:
        endpoint: where it listens.

    Raises:
        SettingsError: no port of the range is free.
    """

    def __init__(self, sock: zmq.Socket[bytes], host: str, ports: DataPlane) -> None:
        listening = _listening(host, ports)
        self._lock = threading.Lock()
        # libzmq closes the other one, with its socket.
        self._own: socket.socket | None = listening.dup()
        self._shut = False
        address, port = listening.getsockname()
        self.endpoint = f"tcp://{address}:{port}"
        sock.setsockopt(zmq.USE_FD, listening.detach())
        sock.bind(self.endpoint)

    def let_in(self, anybody: bool) -> None:
        """Take connections, or none until further notice."""
        with self._lock:
            if self._own is None or self._shut is not anybody:
                return
            self._shut = not anybody
            try:
                self._own.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG_EXT, _signature(b"" if anybody else _KEY))
            except OSError:
                try:
                    self._own.setsockopt(socket.IPPROTO_IP, _IP_MINTTL, 0 if anybody else _NONE_REACHES)
                except OSError as error:
                    logger.warning("connections to %s can't be held off here: %s", self.endpoint, error)

    def close(self) -> None:
        """Together with the ZMQ socket: the kernel listens as long as one of the two is open."""
        with self._lock:
            if self._own is not None:
                self._own.close()
                self._own = None


def _signature(key: bytes) -> bytes:
    """Linux' struct tcp_md5sig, for peers of any address; an empty key ends it."""
    anywhere = struct.pack("=HH4s", socket.AF_INET, 0, bytes(4)).ljust(128, b"\0")
    return anywhere + struct.pack("=BBHi", _PREFIX, 0, len(key), 0) + key.ljust(80, b"\0")


def _listening(host: str, ports: DataPlane) -> socket.socket:
    """On the first port of the range that is free, or on any free port."""
    error: OSError | None = None
    for port in range(ports.port_min, ports.port_max + 1) if ports.port_max else [0]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(_BACKLOG)
        except OSError as refused:
            sock.close()
            error = refused
            if refused.errno == errno.EADDRINUSE:
                continue
            break
        sock.setblocking(False)
        return sock
    raise SettingsError(
        f"data_plane: no port to bind on {host} from {ports.port_min} to {ports.port_max}:"
        f" {error.strerror or error if error else 'the range is empty'}"
    )
