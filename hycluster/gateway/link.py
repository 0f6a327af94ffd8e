"""A gateway's connection to one replica: two sockets, a greeting, and what is on its way over them."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ReplicaAddress, ReplicaLoad
from hycluster.engine.protocol import EngineInfo
from hycluster.gateway.flight import Flight
from hycluster.replica.wire import READY, Kind, decode_info, notice_lost

HELLO_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class Link:
    """The connection to one replica, and the books on it.

    Attributes:
        monitor: says when the connection for outputs closes.
        slot: the number by which metrics tell replicas apart.
        accepting: it takes new requests.
        load: as its last report says.
        outstanding_tokens: to prefill or decode there for this gateway.
        heard_s: on the monotonic clock, its last word, or when it was first expected to say one.
        flights: by the id that its engine knows them by.
    """

    address: ReplicaAddress
    requests: zmq.asyncio.Socket
    outputs: zmq.asyncio.Socket
    monitor: zmq.asyncio.Socket
    info: EngineInfo
    slot: int = 0
    accepting: bool = True
    load: ReplicaLoad | None = None
    outstanding_tokens: int = 0
    heard_s: float = field(default_factory=time.monotonic)
    flights: dict[str, Flight] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def close(self, *, linger_ms: int = 0) -> None:
        """Close its sockets; what was sent and has not left yet may take so long to go."""
        _close(self.monitor, self.requests, self.outputs, linger_ms)


async def connect(context: zmq.asyncio.Context, address: ReplicaAddress) -> Link:
    """Connect to a replica and greet it.

    Raises:
        ConnectionError: it does not answer, or refuses; the directory may still name one that has just died.
    """
    identity = secrets.token_bytes(16)
    requests, outputs = (_socket(context, identity, address.lost_after_s) for _ in range(2))
    monitor = outputs.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
    link = None
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            # Say hello only when the other side knows our identity for outputs: none may go astray.
            outputs.connect(address.outputs)
            if (await recv_monitor_message(monitor))["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise ConnectionError(f"{address.outputs} does not answer")
            requests.connect(address.requests)
            await requests.send_multipart([Kind.HELLO, address.token.encode()])
            answer, payload = await requests.recv_multipart()
        if answer != READY:
            raise ConnectionError(payload.decode(errors="replace"))
        link = Link(address, requests, outputs, monitor, decode_info(payload))
    except TimeoutError:
        raise ConnectionError("timed out") from None
    except (OSError, zmq.ZMQError) as error:
        raise ConnectionError(str(error)) from error
    finally:
        if link is None:
            _close(monitor, requests, outputs, 0)
    return link


def _socket(context: zmq.asyncio.Context, identity: bytes, lost_after_s: float) -> zmq.asyncio.Socket:
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, identity)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    # A replica that comes back is a new one, with a new address.
    sock.setsockopt(zmq.RECONNECT_IVL, -1)
    notice_lost(sock, lost_after_s)
    return sock


def _close(
    monitor: zmq.asyncio.Socket, requests: zmq.asyncio.Socket, outputs: zmq.asyncio.Socket, linger_ms: int
) -> None:
    outputs.disable_monitor()
    monitor.close(linger=0)
    requests.close(linger=linger_ms)
    outputs.close(linger=linger_ms)
