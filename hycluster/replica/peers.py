"""Who may connect to a replica, and how many may be there who have not said yet who they are.

A replica makes its own credentials and says them in its address, which the directory hands to whoever asks within the
Ray cluster; so they end with it, and a directory that starts again hears them with the next report. What a peer without
them can do ends in libzmq's handshake, before the first message:

    encrypted       ZMQ's CURVE. The peer knows the replica's public key, and holds the key pair that the replica takes.
    not encrypted   ZMQ's PLAIN, with the token as its password: who can read the network can read that too.

libzmq asks by ZAP (ZeroMQ's RFC 27) whether to let somebody in; a thread here answers. The same thread counts the
connections, and holds the port shut while too many are strangers.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from dataclasses import dataclass, field

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ReplicaAddress
from hycluster.replica.frames import PIECE_BYTES
from hycluster.replica.listener import Listener
from hycluster.replica.sparing_log import SparingLog
from hycluster.settings.load import DataPlane

logger = logging.getLogger(__name__)

# Connections of a socket that have not said hello. Gateways say it within milliseconds, some at the same time.
MOST_STRANGERS = 128
# How long a handshake may take; on a machine whose processors are busy too.
HANDSHAKE_S = 5.0
# What CURVE puts around a frame, and more.
_AROUND_A_FRAME = 1024
_LOOK_EVERY_MS = 200
# Of one socket's news; who floods it must not keep others from being let in.
_MOST_AT_A_TIME = 100
_ZAP = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"hycluster"
_USER = b"gateway"
_REFUSED_EVENTS = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What opens one replica.

    Attributes:
        token: said in every greeting.
        server_key, server_secret: the replica's key pair; empty if it does not encrypt.
        client_key, client_secret: the pair that its peers show.
    """

    token: str = field(repr=False)
    server_key: str = ""
    server_secret: str = field(default="", repr=False)
    client_key: str = ""
    client_secret: str = field(default="", repr=False)

    @classmethod
    def made(cls, *, encrypted: bool) -> Credentials:
        """New ones, that nobody knows yet."""
        token = secrets.token_hex(16)
        if not encrypted:
            return cls(token)
        server, client = ([key.decode() for key in zmq.curve_keypair()] for _ in range(2))
        return cls(token, *server, *client)

    def open(self, mechanism: bytes, *shown: bytes) -> bool:
        """Whether a peer that shows this is let in. CURVE has proved by then that it holds the key's secret half."""
        if self.server_key:
            return mechanism == b"CURVE" and hmac.compare_digest(shown[0], z85.decode(self.client_key.encode()))
        return mechanism == b"PLAIN" and hmac.compare_digest(shown[1], self.token.encode())


def show_credentials(sock: zmq.Socket[bytes] | zmq.asyncio.Socket, address: ReplicaAddress) -> None:
    """Have a socket say to the replica what its address says; before it connects."""
    if address.server_key:
        sock.curve_serverkey = address.server_key.encode()
        sock.curve_publickey, sock.curve_secretkey = address.client_key.encode(), address.client_secret.encode()
    else:
        sock.plain_username, sock.plain_password = _USER, address.token.encode()


@dataclass(slots=True)
class _Watched:
    """One socket's ports, and the connections that it took, by their file descriptors."""

    listeners: list[Listener]
    open: set[int] = field(default_factory=set)


class Doorkeeper:
    """Lets in who has the credentials, to the sockets that it listens for.

    Args:
        context: of these sockets; ZAP is asked within it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], credentials: Credentials) -> None:
        self._credentials = credentials
        self._questions = context.socket(zmq.REP)
        self._questions.linger = 0
        self._questions.bind(_ZAP)
        # By the socket that tells of it.
        self._watched: dict[zmq.Socket[bytes], _Watched] = {}
        self._listeners: dict[zmq.Socket[bytes], list[Listener]] = {}
        # A gateway has a connection to each socket, and greets by one.
        self._greeted: set[int] = set()
        self._refused = SparingLog(logger, logging.WARNING)
        self._crowded = SparingLog(logger, logging.WARNING)
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="wire-peers", daemon=True)

    def listen(self, sock: zmq.Socket[bytes], host: str, ports: DataPlane) -> str:
        """Have a socket listen; before :meth:`start`. Returns the endpoint.

        Raises:
            SettingsError: no port of the range is free.
        """
        sock.zap_domain = _ZAP_DOMAIN
        # Without somebody to ask, nobody is let in.
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if self._credentials.server_key:
            sock.curve_server = True
            sock.curve_secretkey = self._credentials.server_secret.encode()
        else:
            sock.plain_server = True
        sock.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
        # libzmq takes a frame of any size from whoever connects, before the handshake too.
        sock.setsockopt(zmq.MAXMSGSIZE, PIECE_BYTES + _AROUND_A_FRAME)
        monitor = sock.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED | _REFUSED_EVENTS
        )
        self._listeners[sock] = [Listener(sock, host, ports)]
        self._watched[monitor] = _Watched(self._listeners[sock])
        return self._listeners[sock][0].endpoint

    def listen_further(self, sock: zmq.Socket[bytes], host: str, ports: DataPlane) -> str:
        """Have it listen at another address too; like the socket's other methods by its own thread.

        Raises:
            SettingsError: no port of the range is free.
        """
        listener = Listener(sock, host, ports)
        self._listeners[sock].append(listener)
        return listener.endpoint

    def end(self, sock: zmq.Socket[bytes]) -> None:
        """Close a socket and its ports; by its own thread."""
        sock.close()
        for listener in self._listeners[sock]:
            listener.close()

    def start(self) -> None:
        self._thread.start()

    def greeted(self, message: zmq.Frame) -> None:
        """The connection by which this came is no stranger's any more."""
        self._greeted.add(int(message.get(zmq.SRCFD)))

    def close(self) -> None:
        """After the sockets have been closed."""
        self._closing = True
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        poller = zmq.Poller()
        for sock in (self._questions, *self._watched):
            poller.register(sock, zmq.POLLIN)
        while not self._closing:
            for sock, _ in poller.poll(_LOOK_EVERY_MS):
                if sock is self._questions:
                    self._answer()
                elif not self._heed(sock):
                    poller.unregister(sock)
            for watched in self._watched.values():
                self._count(watched)
        for sock in (self._questions, *self._watched):
            sock.close(linger=0)

    def _answer(self) -> None:
        version, request_id, _domain, _address, _identity, mechanism, *shown = self._questions.recv_multipart()
        try:
            welcome = self._credentials.open(mechanism, *shown)
        except (IndexError, TypeError):
            welcome = False
        status, user = (b"200", _USER) if welcome else (b"400", b"")
        self._questions.send_multipart([version, request_id, status, b"", user, b""])

    def _heed(self, monitor: zmq.Socket[bytes]) -> bool:
        """Whether there is more to hear of this socket."""
        watched = self._watched[monitor]
        for _ in range(_MOST_AT_A_TIME):
            if not monitor.poll(0):
                break
            event = recv_monitor_message(monitor)
            if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                return False
            if event["event"] == zmq.EVENT_ACCEPTED:
                watched.open.add(event["value"])
                self._count(watched)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                watched.open.discard(event["value"])
                self._greeted.discard(event["value"])
            else:
                self._refused.write("a connection without this replica's credentials was refused")
        return True

    def _count(self, watched: _Watched) -> None:
        strangers = len(watched.open) - len(self._greeted)
        if strangers >= MOST_STRANGERS:
            self._crowded.write("%d connections have not said who they are; no more are taken for now", strangers)
        elif strangers > MOST_STRANGERS // 2:
            return
        for listener in list(watched.listeners):
            listener.let_in(strangers < MOST_STRANGERS)
