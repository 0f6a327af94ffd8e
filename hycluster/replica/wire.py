"""Between gateway and replica: every stream's tokens of an engine step in one message.

A replica binds two ZMQ ROUTER sockets, for requests and for outputs; a gateway connects a DEALER to
each under one random identity. What travels is vLLM's own msgpack, never pickle:

    gateway -> replica   [kind, payload...]      kind is one byte, see Kind
    replica -> gateway   on the request socket   READY with the engine's info, or REFUSED with a reason
                         on the output socket    the frames of one EngineCoreOutputs; empty = engine ended

A gateway that ends its HELLO with FOLLOW_BLOCKS hears which KV blocks the replica has, and from then on which come and
go, in frames before those of outputs (``hycluster/engine/block_changes.py``): in the message of the step that did it,
or in one without outputs where the step had none for it.

The ranks of a data-parallel group reach each other by the same request sockets:

    rank -> rank         [SIBLING, token, payload]   payload is the engine's own, see Engine.hear

Nobody gets so far as to send one of these without the replica's credentials (``peers.py``); a gateway that does not say
its token in its HELLO is not heard either. A long frame travels in pieces (``frames.py``). Control methods that a
gateway may call are an allowlist. A gateway that is gone, or does not read, loses its requests in the engine; it never
holds up the others.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ReplicaAddress
from hycluster.engine.protocol import SIBLINGS, Engine, EngineInfo, Frame
from hycluster.errors import SettingsError
from hycluster.replica.frames import PARTS, in_pieces, joined
from hycluster.replica.peers import Credentials, Doorkeeper, show_credentials
from hycluster.replica.sparing_log import SparingLog
from hycluster.settings.load import DataPlane

logger = logging.getLogger(__name__)


class MessageKind(bytes, Enum):
    """First frame of a message to a replica. The first three are vLLM's ``EngineCoreRequestType``."""

    ADD = b"\x00"
    ABORT = b"\x01"
    CALL = b"\x03"
    HELLO = b"H"
    BYE = b"B"
    SIBLING = b"S"


READY, REFUSED = b"READY", b"REFUSED"
FOLLOW_BLOCKS = b"blocks"

# Methods of vLLM's engine core that a gateway may call. ``collective_rpc``, ``save_sharded_state`` and the
# like run arbitrary code in the engine and stay closed.
CONTROL_METHODS = frozenset(
    {
        "get_supported_tasks",
        "add_lora",
        "remove_lora",
        "list_loras",
        "pin_lora",
        "reset_prefix_cache",
        "reset_mm_cache",
        "reset_encoder_cache",
        "pause_scheduler",
        "resume_scheduler",
        "is_scheduler_paused",
        "sleep",
        "wake_up",
        "is_sleeping",
        "profile",
    }
)

# vLLM's number of the client that outputs for none in particular go to; gateways have the numbers from 1.
NO_CLIENT = 0

# Messages that may wait for a gateway that does not read: one a step, so some minutes of decoding.
OUTPUT_BACKLOG = 10_000
# Messages that may wait for the engine's thread here; the rest waits at the gateway, which sent them.
REQUEST_BACKLOG = 10_000
# How long a gateway that has said hello may take until its output connection is known here.
CONNECT_GRACE_S = 1.0


def notice_lost_peers(sock: zmq.Socket[bytes] | zmq.asyncio.Socket, after_s: float) -> None:
    """Have a socket close connections to machines that are gone without a word; before it binds or connects.

    libzmq's own threads ask and answer, however long Python or the engine is busy. A beat goes out every ``IVL``, and
    nothing may come for ``TIMEOUT`` behind it.
    """
    beat_ms = int(after_s * 1000 / 4)
    sock.setsockopt(zmq.HEARTBEAT_IVL, beat_ms)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(after_s * 1000) - beat_ms)
    # A machine that never answers a connection is tried no longer either; libzmq leaves that to the kernel, minutes.
    sock.setsockopt(zmq.CONNECT_TIMEOUT, int(after_s * 1000))
    # What was sent and is not acknowledged: the kernel would repeat it for a quarter of an hour.
    sock.setsockopt(zmq.TCP_MAXRT, int(after_s * 1000))


def encode_info(info: EngineInfo) -> bytes:
    return msgspec.msgpack.encode(asdict(info))


def decode_info(payload: Frame) -> EngineInfo:
    return msgspec.msgpack.decode(payload, type=EngineInfo)


class EngineServer:
    """Offers one engine to any number of gateways, on two threads.

    Attributes:
        address: what a gateway needs to connect.
    """

    def __init__(self, engine: Engine, *, replica_id: str, model: str, host: str, ports: DataPlane) -> None:
        self._engine = engine
        self._context = zmq.Context()
        self._clients: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._greeted: dict[int, float] = {}
        self._next_client = 1
        self._siblings: list[tuple[zmq.Socket[bytes], bytes]] = []
        self._closing = False
        self._dropped = SparingLog(logger, logging.ERROR)
        credentials = Credentials.made(encrypted=ports.encrypted)
        self._token = credentials.token
        self._door = Doorkeeper(self._context, credentials)
        self._ending = threading.Lock()

        self._requests = self._context.socket(zmq.ROUTER)
        self._outputs = self._context.socket(zmq.ROUTER)
        # Nothing is ever read from the second.
        for sock, backlog in ((self._requests, REQUEST_BACKLOG), (self._outputs, 1)):
            sock.linger = 1000
            sock.setsockopt(zmq.RCVHWM, backlog)
            sock.setsockopt(zmq.SNDHWM, OUTPUT_BACKLOG)
            notice_lost_peers(sock, ports.lost_after_s)
        self._outputs.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            requests, outputs = (self._door.listen(sock, host, ports) for sock in (self._requests, self._outputs))
        except SettingsError:
            self._context.destroy(linger=0)
            raise
        self.address = ReplicaAddress(
            replica_id=replica_id,
            model=model,
            requests=requests,
            outputs=outputs,
            token=credentials.token,
            lost_after_s=ports.lost_after_s,
            server_key=credentials.server_key,
            client_key=credentials.client_key,
            client_secret=credentials.client_secret,
        )
        self._ports = ports
        self._further: str | None = None
        # The thread that writes outputs is not to be woken; the one that reads requests binds their socket for it.
        self._binding = threading.Lock()
        self._door.start()
        self._threads = [
            threading.Thread(target=self._read_requests, name="wire-requests", daemon=True),
            threading.Thread(target=self._write_outputs, name="wire-outputs", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def listen_at(self, host: str) -> None:
        """Listen at another address too; :attr:`address` says it, and only it, once that is so."""
        self._further = host

    def join(self, siblings: Sequence[ReplicaAddress], on_lost: Callable[[str], None] | None = None) -> None:
        """Learn where the other ranks of the data-parallel group are; once, before the first gateway connects.

        Args:
            on_lost: told the id of a rank when the connection to it has ended, on a thread of its own.
        """
        known: list[tuple[zmq.Socket[bytes], bytes]] = []
        monitors: dict[zmq.Socket[bytes], str] = {}
        for address in siblings:
            sock = self._context.socket(zmq.DEALER)
            sock.linger = 0
            notice_lost_peers(sock, address.lost_after_s)
            show_credentials(sock, address)
            if on_lost is not None:
                monitors[sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)] = address.replica_id
            sock.connect(address.requests)
            known.append((sock, address.token.encode()))
        # From here on they belong to the thread that writes outputs.
        self._siblings = known
        if on_lost is not None and monitors:
            watching = threading.Thread(
                target=self._watch_siblings, args=(monitors, on_lost), name="wire-siblings", daemon=True
            )
            watching.start()
            self._threads.append(watching)

    def _watch_siblings(self, monitors: dict[zmq.Socket[bytes], str], on_lost: Callable[[str], None]) -> None:
        poller = zmq.Poller()
        for monitor in monitors:
            poller.register(monitor, zmq.POLLIN)
        while not self._closing:
            for monitor, _ in poller.poll(200):
                if recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED and not self._closing:
                    on_lost(monitors[monitor])
        for monitor in monitors:
            monitor.close(linger=0)

    def wait_until_ended(self) -> None:
        """Block until the engine has ended, in good order or not."""
        self._threads[1].join()

    @property
    def gateways(self) -> int:
        """Gateways connected now."""
        return len(self._clients)

    def _read_requests(self) -> None:
        poller = zmq.Poller()
        poller.register(self._requests, zmq.POLLIN)
        while not self._closing:
            if self._further is not None:
                self._listen_further()
            if not poller.poll(200):
                continue
            identity, *message = self._requests.recv_multipart(copy=False)
            try:
                self._hear(bytes(identity.buffer), message)
            except Exception:
                # vLLM's decoder raises many kinds; the thread must live. Not who it was: an identity is a name that
                # whoever reads the log could send under.
                self._dropped.write("a gateway's message dropped", exc_info=True)
        self._door.end(self._requests)

    def _listen_further(self) -> None:
        host, self._further = self._further or "", None
        try:
            requests = self._door.listen_further(self._requests, host, self._ports)
            with self._binding:
                if self._outputs.closed:
                    return
                outputs = self._door.listen_further(self._outputs, host, self._ports)
        except SettingsError as error:
            logger.error("gateways on other machines can't reach this replica: %s", error)
            return
        self.address = replace(self.address, requests=requests, outputs=outputs)

    def _hear(self, identity: bytes, message: Sequence[zmq.Frame]) -> None:
        first, *payload = [frame.buffer for frame in message]
        if first == PARTS:
            first, *payload = joined(payload[0], payload[1:])
        kind = MessageKind(bytes(first))
        if kind in (MessageKind.HELLO, MessageKind.SIBLING):
            token, *rest = payload
            if not hmac.compare_digest(bytes(token), self._token.encode()):
                self._refuse(identity, b"wrong token")
                return
            self._door.greeted(message[0])
            if kind is MessageKind.SIBLING:
                self._engine.hear(rest)
            else:
                self._welcome(identity, follows=FOLLOW_BLOCKS in rest)
            return
        client = self._clients.get(identity)
        if client is None:
            self._refuse(identity, b"say hello first")
            return
        self._handle(client, kind, payload)

    def _handle(self, client: int, kind: MessageKind, payload: Sequence[memoryview]) -> None:
        if kind is MessageKind.ADD:
            self._engine.add(client, payload)
        elif kind is MessageKind.ABORT:
            self._engine.abort(client, msgspec.msgpack.decode(payload[0], type=list[str]))
        elif kind is MessageKind.CALL:
            call_id, method, arguments = msgspec.msgpack.decode(payload[0], type=tuple[int, str, list[Any]])
            if method not in CONTROL_METHODS:
                raise ValueError(f"control method {method!r} is not allowed")
            self._engine.call(client, call_id, method, arguments)
        elif kind is MessageKind.BYE:
            self._forget(client)

    def _refuse(self, identity: bytes, why: bytes) -> None:
        self._requests.send_multipart([identity, REFUSED, why])

    def _welcome(self, identity: bytes, follows: bool) -> None:
        if identity not in self._clients:
            client, self._next_client = self._next_client, self._next_client + 1
            self._greeted[client] = time.monotonic()
            self._identities[client] = identity
            self._clients[identity] = client
        self._requests.send_multipart([identity, READY, encode_info(self._engine.info)])
        if follows:
            self._engine.follow_blocks(self._clients[identity])

    def _forget(self, client: int) -> None:
        identity = self._identities.pop(client, None)
        if identity is not None:
            self._clients.pop(identity, None)
            self._greeted.pop(client, None)
            self._engine.abort_client(client)

    def _write_outputs(self) -> None:
        last = NO_CLIENT
        while (item := self._engine.next_output()) is not None:
            client, frames = item
            if client == SIBLINGS:
                for sibling, token in self._siblings:
                    sibling.send_multipart(in_pieces([MessageKind.SIBLING, token, *frames]))
                continue
            if client == NO_CLIENT:
                # The counts of a step that had no tokens for anybody: any gateway adds them up. Most likely they are
                # of work for the one that had the last tokens.
                client = last if last in self._identities else next(iter(list(self._identities)), NO_CLIENT)
            last = client
            identity = self._identities.get(client)
            if identity is not None and not self._send(client, [identity, *frames]):
                logger.warning("gateway %d is gone; its requests are dropped", client)
                self._forget(client)
        for client, identity in list(self._identities.items()):
            self._send(client, [identity, b""])
        with self._binding:
            self._door.end(self._outputs)
        for sibling, _ in self._siblings:
            sibling.close()

    def _send(self, client: int, message: Sequence[Frame]) -> bool:
        while True:
            try:
                with self._binding:
                    self._outputs.send_multipart(message, flags=zmq.NOBLOCK)
                self._greeted.pop(client, None)
                return True
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                if time.monotonic() - self._greeted.get(client, 0.0) > CONNECT_GRACE_S:
                    return False
                time.sleep(0.002)

    def close(self) -> None:
        """Stop listening. Shut the engine down first: the output thread ends when the engine does."""
        self._closing = True
        # Sockets that two threads close abort the process.
        with self._ending:
            for thread in self._threads:
                thread.join(timeout=10)
            self._door.close()
            self._context.destroy(linger=500)
