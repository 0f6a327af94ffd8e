"""Who has no credentials costs a replica nothing and hears nothing, spoken to over raw sockets."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import msgspec
import psutil
import pytest
import zmq

from hycluster.core import ReplicaAddress
from hycluster.directory.directory import Directory, ReplicaReport
from hycluster.replica import peers, sparing_log
from hycluster.replica.frames import PIECE_BYTES
from hycluster.replica.peers import Credentials, show_credentials
from hycluster.replica.wire import READY, MessageKind
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.replica.test_wire import RawGateway
from tests.simulated_pool import SimulatedReplica
from tests.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.timeout(120)

SLOW = Simulated(step_base_s=0.005, decode_token_s=0.0)


@pytest.fixture(params=[True, False], ids=["encrypted", "not-encrypted"])
def encrypted(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def replica(encrypted: bool) -> Iterator[SimulatedReplica]:
    made = SimulatedReplica(SLOW, ports=DataPlane(host="127.0.0.1", encrypted=encrypted))
    yield made
    made.close()


@pytest.fixture
def gateway(replica: SimulatedReplica) -> Iterator[RawGateway]:
    made = RawGateway(replica.address)
    assert made.hello()[0] == READY
    yield made
    made.close()


def greeting(mechanism: bytes) -> bytes:
    """The first bytes of ZMTP 3."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes = b"") -> bytes:
    content = bytes([len(name)]) + name + body
    return b"\x06" + struct.pack(">Q", len(content)) + content


def frame(size: int) -> bytes:
    """One that is not the last of its message."""
    return b"\x03" + struct.pack(">Q", size) + bytes(size)


def stranger(endpoint: str) -> socket.socket:
    host, port = endpoint.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def poured(endpoint: str, first: bytes, more: bytes, most: int) -> int:
    """Bytes that a peer that sends on and on got rid of before it was cut off."""
    sent = 0
    with stranger(endpoint) as sock:
        try:
            sock.sendall(first)
            while sent < most:
                sock.sendall(more)
                sent += len(more)
        except OSError:
            pass
    return sent


READY_COMMAND = command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER")
PASSWORD = command(b"HELLO", b"\x07gateway\x05wrong")


@pytest.mark.parametrize(
    ("first", "more"),
    [
        pytest.param(greeting(b"NULL") + READY_COMMAND, frame(64 << 10), id="as-it-was"),
        pytest.param(greeting(b"CURVE"), frame(64 << 10), id="no-handshake"),
        pytest.param(greeting(b"PLAIN") + PASSWORD, frame(64 << 10), id="wrong-password"),
        pytest.param(greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 1 << 40), bytes(64 << 10), id="long-command"),
        pytest.param(greeting(b"PLAIN") + b"\x06" + struct.pack(">Q", 1 << 40), bytes(64 << 10), id="long-password"),
        pytest.param(bytes([1, 0]) * 8, frame(64 << 10), id="zmtp-1"),
    ],
)
def test_no_message_of_a_stranger_is_taken_in(replica: SimulatedReplica, first: bytes, more: bytes) -> None:
    """One without an end took 1.2 GiB in 7 s."""
    before = psutil.Process().memory_info().rss
    for endpoint in (replica.address.requests, replica.address.outputs):
        # What fits into the kernel's buffers is gone before the other side looks.
        assert poured(endpoint, first, more, 64 << 20) < 32 << 20
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_who_has_other_credentials_is_refused(replica: SimulatedReplica, encrypted: bool) -> None:
    other = Credentials.made(encrypted=encrypted)
    wrong = [
        replace(replica.address, token=other.token, client_key=other.client_key, client_secret=other.client_secret)
    ]
    wrong += [replace(replica.address, server_key=other.server_key)] if encrypted else []
    # What a replica says of its credentials in the other way does not open this one.
    wrong += [replace(replica.address, server_key="") if encrypted else replace(wrong[0], server_key="")]
    if not encrypted:
        made = Credentials.made(encrypted=True)
        wrong += [replace(replica.address, **{k: v for k, v in asdict(made).items() if k != "server_secret"})]
    for address in wrong:
        peer = RawGateway(address)
        peer.requests.setsockopt(zmq.RCVTIMEO, 300)
        with pytest.raises(zmq.Again):
            peer.hello(replica.address.token)
        peer.close()
    assert replica.server.gateways == 0


def test_an_identity_is_nobodys_word(replica: SimulatedReplica, gateway: RawGateway) -> None:
    """Whoever had seen it on the wire could abort the requests of its owner, and take its connection over."""
    gateway.add("a", max_tokens=10_000)
    eventually(lambda: replica.requests == 1)
    identity = gateway.requests.getsockopt(zmq.IDENTITY)
    abort = [MessageKind.ABORT, msgspec.msgpack.encode(["a"])]
    with zmq.Context() as context:
        for has_credentials in (False, True):
            with context.socket(zmq.DEALER) as thief, context.socket(zmq.DEALER) as ear:
                for sock, endpoint in ((thief, replica.address.requests), (ear, replica.address.outputs)):
                    sock.linger = 0
                    sock.setsockopt(zmq.IDENTITY, identity)
                    if has_credentials:
                        show_credentials(sock, replica.address)
                    sock.connect(endpoint)
                for kind in (abort, [MessageKind.BYE]):
                    # Once it has been refused libzmq has no way left to send by, and would wait for one.
                    with contextlib.suppress(zmq.Again):
                        thief.send_multipart(kind, zmq.NOBLOCK)
                assert not ear.poll(300)
            assert replica.requests == 1
    # And it hears what is its own.
    for _ in range(50):
        gateway.read()


def test_what_gateways_and_replicas_say_can_be_read_by_nobody(replica: SimulatedReplica, encrypted: bool) -> None:
    heard = bytearray()
    with recorded(replica.address, heard) as address:
        peer = RawGateway(address)
        assert peer.hello()[0] == READY
        peer.add("a name that is easily found")
        assert list(peer.finish(1)) == ["a name that is easily found"]
        peer.close()
    for secret in (b"easily found", replica.address.token.encode()):
        assert (secret in heard) is not encrypted
    assert replica.address.client_secret.encode() not in heard or not encrypted


class recorded:
    """A replica's address by way of somebody who listens in."""

    def __init__(self, address: ReplicaAddress, heard: bytearray) -> None:
        self._heard = heard
        self._sockets: list[socket.socket] = []
        self._address = replace(
            address, requests=self._between(address.requests), outputs=self._between(address.outputs)
        )

    def __enter__(self) -> ReplicaAddress:
        return self._address

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()

    def _between(self, endpoint: str) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listening)
        threading.Thread(target=self._carry, args=(listening, endpoint), daemon=True).start()
        return f"tcp://127.0.0.1:{listening.getsockname()[1]}"

    def _carry(self, listening: socket.socket, endpoint: str) -> None:
        here, there = listening.accept()[0], stranger(endpoint)
        self._sockets += [here, there]

        def copy(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    self._heard.extend(data)
                    sink.sendall(data)
            except OSError:
                pass

        threading.Thread(target=copy, args=(there, here), daemon=True).start()
        copy(here, there)


def connections(replica: SimulatedReplica) -> int:
    """That the replica has taken, at its requests' port."""
    port = int(replica.address.requests.rpartition(":")[2])
    return sum(
        connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        for connection in psutil.Process(os.getpid()).net_connections("tcp")
    )


@pytest.mark.parametrize("encrypted", [True], ids=["encrypted"], indirect=True)
def test_silent_connections_take_few_descriptors_and_nobodys_place(
    monkeypatch: pytest.MonkeyPatch, replica: SimulatedReplica, gateway: RawGateway
) -> None:
    monkeypatch.setattr(peers, "MOST_STRANGERS", 20)
    gateway.add("a", max_tokens=10_000)
    gateway.read()
    silent: list[socket.socket] = []
    host, port = replica.address.requests.removeprefix("tcp://").split(":")
    for _ in range(600):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((host, int(port)))
        silent.append(sock)
    time.sleep(1)
    # Some came while the replica was about to shut its port, and as many wait in the kernel's queue.
    assert connections(replica) < 300
    # The one that is known is served as before.
    for _ in range(50):
        gateway.read()
    for sock in silent:
        sock.close()
    # And there is room for others again.
    late = RawGateway(replica.address)
    assert late.hello()[0] == READY
    late.close()


@pytest.mark.parametrize("encrypted", [True], ids=["encrypted"], indirect=True)
def test_who_does_not_say_who_it_is_is_cut_off(replica: SimulatedReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HANDSHAKE_S", 0.3)
    other = SimulatedReplica(SLOW)
    began = time.monotonic()
    with stranger(other.address.requests) as sock:
        sock.sendall(greeting(b"CURVE")[:20])
        while sock.recv(100):
            pass
    assert time.monotonic() - began > 0.2
    other.close()


@pytest.mark.parametrize("encrypted", [True], ids=["encrypted"], indirect=True)
def test_gateways_that_have_said_hello_are_no_strangers(
    replica: SimulatedReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MOST_STRANGERS", 6)
    gateways = [RawGateway(replica.address) for _ in range(5)]
    for gateway in gateways:
        assert gateway.hello()[0] == READY
    gateways += (late := [RawGateway(replica.address) for _ in range(5)])
    for gateway in late:
        assert gateway.hello()[0] == READY
    for gateway in gateways:
        gateway.close()
    eventually(lambda: not replica.server._door._greeted)


def test_junk_writes_few_lines_and_no_names(
    replica: SimulatedReplica, gateway: RawGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 messages of a stranger made 12 MB."""
    identity = gateway.requests.getsockopt(zmq.IDENTITY)
    assert isinstance(identity, bytes)
    with caplog.at_level(logging.DEBUG, "hycluster"):
        for _ in range(2000):
            gateway.requests.send_multipart([b"?" * 100])
        for _ in range(20):
            with stranger(replica.address.requests) as sock:
                sock.sendall(greeting(b"NULL") + READY_COMMAND)
        gateway.add("a")
        gateway.finish(1)
        eventually(lambda: any("refused" in line for line in caplog.messages))
        assert len(caplog.records) <= 2
        # With the next one it is said how many there were.
        monkeypatch.setattr(sparing_log, "EVERY_S", 0.0)
        gateway.requests.send_multipart([b"?"])
        eventually(lambda: bool(re.search(r"a gateway's message dropped \(and 1999 like it", caplog.text)))
    for name in (identity.hex(), str(identity), replica.address.token):
        assert name not in caplog.text


def test_secrets_are_in_no_text(replica: SimulatedReplica) -> None:
    address = replica.address
    for secret in filter(None, (address.token, address.client_secret)):
        assert secret not in str(address)
        assert secret not in repr(ReplicaReport(address, replica.engine.load()))


def test_a_directory_that_starts_again_hears_them_with_the_next_report(replica: SimulatedReplica) -> None:
    model = Model(name="tiny", source="/m", simulated=SLOW)
    first, again = Directory(), Directory()
    for directory in (first, again):
        directory.report(model, replica.report)
        (known,) = directory.view("tiny").replicas
        peer = RawGateway(known.address)
        assert peer.hello()[0] == READY
        peer.close()


def test_a_replica_may_listen_at_another_address_too(replica: SimulatedReplica, gateway: RawGateway) -> None:
    """As when a second machine joins the cluster."""
    gateway.add("a", max_tokens=10_000)
    gateway.read()
    replica.server.listen_at("127.0.0.2")
    eventually(lambda: "//127.0.0.2:" in replica.address.requests)
    assert "//127.0.0.2:" in replica.address.outputs
    other = RawGateway(replica.address)
    assert other.hello()[0] == READY
    other.add("b")
    assert list(other.finish(1)) == ["b"]
    other.close()
    for _ in range(50):
        gateway.read()


def test_a_long_message_comes_in_pieces(replica: SimulatedReplica, gateway: RawGateway) -> None:
    prompt = tuple(range(70_000, 70_000 + SLOW.max_model_len - 10))
    gateway.add("a" * 2 * PIECE_BYTES, prompt=prompt)
    (name,) = gateway.finish(1)
    assert name == "a" * 2 * PIECE_BYTES


def test_a_frame_that_is_too_long_ends_its_connection_and_no_other(
    replica: SimulatedReplica, gateway: RawGateway
) -> None:
    rude = RawGateway(replica.address)
    assert rude.hello()[0] == READY
    rude.requests.send_multipart([MessageKind.ADD, bytes(2 * PIECE_BYTES)])
    gateway.add("a")
    assert list(gateway.finish(1)) == ["a"]
    rude.close()
