"""A gateway's sockets to one replica, and the greeting over them; see ``hycluster/replica/wire.py``."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from hycluster.core import ReplicaAddress
from hycluster.engine.protocol import EngineInfo
from hycluster.replica.peers import show_credentials
from hycluster.replica.wire import FOLLOW_BLOCKS, READY, MessageKind, decode_info, notice_lost_peers

HELLO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ReplicaConnection:
    """The sockets to a replica that has greeted back.

    Attributes:
        outputs: read by an :class:`OutputReader`.
        monitor: says when the connection for outputs closes.
        info: what the replica's engine is.
    """

    address: ReplicaAddress
    requests: zmq.asyncio.Socket
    outputs: zmq.Socket[bytes]
    monitor: zmq.asyncio.Socket
    info: EngineInfo

    def close(self, *, linger_ms: int = 0) -> None:
        """Close the sockets; what was sent and has not left yet may take so long to go."""
        _close(self.monitor, self.requests, self.outputs, linger_ms)


async def connect(
    context: zmq.asyncio.Context, address: ReplicaAddress, *, follow_blocks: bool = False
) -> ReplicaConnection:
    """Connect to a replica and greet it.

    Args:
        follow_blocks: hear what becomes of its KV blocks.

    Raises:
        ConnectionError: it does not answer, or refuses; the directory may still name one that has just died.
    """
    identity = secrets.token_bytes(16)
    requests: zmq.asyncio.Socket = _socket(context, zmq.asyncio.Socket, identity, address)
    outputs: zmq.Socket[bytes] = _socket(context, zmq.Socket, identity, address)
    # Of the context's kind, for awaiting.
    monitor: Any = outputs.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
    connection = None
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            # Say hello only when the other side knows our identity for outputs: none may go astray.
            outputs.connect(address.outputs)
            if (await recv_monitor_message(monitor))["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise ConnectionError(f"{address.outputs} does not answer")
            requests.connect(address.requests)
            further = [FOLLOW_BLOCKS] if follow_blocks else []
            await requests.send_multipart([MessageKind.HELLO, address.token.encode(), *further])
            answer, payload = await requests.recv_multipart()
        if answer != READY:
            raise ConnectionError(payload.decode(errors="replace"))
        connection = ReplicaConnection(address, requests, outputs, monitor, decode_info(payload))
    except TimeoutError:
        raise ConnectionError("timed out") from None
    except (OSError, zmq.ZMQError) as error:
        raise ConnectionError(str(error)) from error
    finally:
        if connection is None:
            _close(monitor, requests, outputs, 0)
    return connection


def _socket(context: zmq.asyncio.Context, kind: Any, identity: bytes, address: ReplicaAddress) -> Any:
    sock = context.socket(zmq.DEALER, socket_class=kind)
    sock.setsockopt(zmq.IDENTITY, identity)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    # A replica that comes back is a new one, with a new address.
    sock.setsockopt(zmq.RECONNECT_IVL, -1)
    notice_lost_peers(sock, address.lost_after_s)
    show_credentials(sock, address)
    return sock


def _close(
    monitor: zmq.asyncio.Socket, requests: zmq.asyncio.Socket, outputs: zmq.Socket[bytes], linger_ms: int
) -> None:
    outputs.disable_monitor()
    monitor.close(linger=0)
    requests.close(linger=linger_ms)
    outputs.close(linger=linger_ms)
