"""The replica's side of the wire, spoken to over raw sockets and without vLLM."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import zmq

from hycluster.core import ReplicaAddress
from hycluster.engine import messages
from hycluster.engine.messages import EngineCoreOutputs, FinishReason
from hycluster.engine.protocol import SIBLINGS
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import SettingsError
from hycluster.replica import wire
from hycluster.replica.frames import PARTS, in_pieces
from hycluster.replica.peers import show_credentials
from hycluster.replica.wire import NO_CLIENT, READY, REFUSED, EngineServer, MessageKind, decode_info
from hycluster.settings.load import DataPlane
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedReplica, predicted
from tests.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.timeout(120)

FAST = Simulated(realtime=False)
SLOW = Simulated(step_base_s=0.005, decode_token_s=0.0)


class RawGateway:
    """The wire's other end."""

    def __init__(self, address: ReplicaAddress, *, receive_buffer: int = 0) -> None:
        self.token = address.token
        self.context = zmq.Context()
        identity = secrets.token_bytes(8)
        self.requests, self.outputs = (self.context.socket(zmq.DEALER) for _ in range(2))
        for sock, endpoint in ((self.requests, address.requests), (self.outputs, address.outputs)):
            sock.setsockopt(zmq.IDENTITY, identity)
            sock.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
            # One that was refused would wait for ever for somebody to send to.
            sock.setsockopt(zmq.SNDTIMEO, int(1000 * PATIENCE_S))
            show_credentials(sock, address)
            if receive_buffer:
                sock.setsockopt(zmq.RCVHWM, 1)
                sock.setsockopt(zmq.RCVBUF, receive_buffer)
            sock.connect(endpoint)

    def hello(self, token: str | None = None) -> list[bytes]:
        self.requests.send_multipart([MessageKind.HELLO, (self.token if token is None else token).encode()])
        return self.requests.recv_multipart()

    def add(self, request_id: str, max_tokens: int = 4, prompt: tuple[int, ...] = (1, 2, 3)) -> None:
        request = messages.EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=messages.SamplingParams(max_tokens=max_tokens),
            arrival_time=time.time(),
        )
        self.requests.send_multipart(in_pieces([MessageKind.ADD, *messages.encode(request)]))

    def call(self, call_id: int, method: str, *arguments: Any) -> None:
        self.requests.send_multipart([MessageKind.CALL, msgspec.msgpack.encode((call_id, method, arguments))])

    def read(self) -> EngineCoreOutputs:
        frames = self.outputs.recv_multipart()
        assert frames != [b""], "the engine ended"
        return messages.decode_outputs(frames)

    def finish(self, requests: int) -> dict[str, list[int]]:
        """Tokens by request, read until this many have ended."""
        tokens: dict[str, list[int]] = {}
        while requests:
            for output in self.read().outputs:
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                requests -= output.finish_reason is not None
        return tokens

    def close(self) -> None:
        self.context.destroy(linger=0)


Start = Callable[[Simulated], SimulatedReplica]
Join = Callable[..., RawGateway]


@pytest.fixture
def start() -> Iterator[Start]:
    replicas: list[SimulatedReplica] = []

    def begin(settings: Simulated = FAST) -> SimulatedReplica:
        replicas.append(SimulatedReplica(settings))
        return replicas[-1]

    yield begin
    for replica in replicas:
        replica.close()


@pytest.fixture
def join() -> Iterator[Join]:
    gateways: list[RawGateway] = []

    def begin(replica: SimulatedReplica, *, hello: bool = True, **options: Any) -> RawGateway:
        gateways.append(RawGateway(replica.address, **options))
        if hello:
            assert gateways[-1].hello()[0] == READY
        return gateways[-1]

    yield begin
    for gateway in gateways:
        gateway.close()


def test_hello_is_answered_with_the_engine(start: Start, join: Join) -> None:
    replica = start(FAST)
    answer, info = join(replica, hello=False).hello()
    assert answer == READY
    assert decode_info(info) == replica.engine.info
    assert replica.server.gateways == 1


def test_hello_twice_is_one_gateway(start: Start, join: Join) -> None:
    replica = start(FAST)
    gateway = join(replica)
    assert gateway.hello()[0] == READY
    assert replica.server.gateways == 1


@pytest.mark.parametrize("token", ["", "wrong", "é"])
def test_wrong_token_is_refused(start: Start, join: Join, token: str) -> None:
    replica = start(FAST)
    gateway = join(replica, hello=False)
    assert gateway.hello(token) == [REFUSED, b"wrong token"]
    gateway.add("a")
    assert gateway.requests.recv_multipart() == [REFUSED, b"say hello first"]
    assert replica.server.gateways == 0


def test_no_hello_is_refused(start: Start, join: Join) -> None:
    replica = start(SLOW)
    gateway = join(replica, hello=False)
    gateway.add("a", max_tokens=1000)
    assert gateway.requests.recv_multipart() == [REFUSED, b"say hello first"]
    assert replica.requests == 0


def test_outputs_of_two_gateways_are_kept_apart(start: Start, join: Join) -> None:
    replica = start(FAST)
    one, two = join(replica), join(replica)
    one.add("same id", prompt=(1, 2))
    two.add("same id", prompt=(3, 4))
    assert one.finish(1) == {"same id": predicted([1, 2], 4, FAST)}
    assert two.finish(1) == {"same id": predicted([3, 4], 4, FAST)}


def test_all_streams_of_a_step_travel_in_one_message(start: Start, join: Join) -> None:
    replica = start(SLOW)
    gateway = join(replica)
    for number in range(20):
        gateway.add(str(number), max_tokens=1000)
    eventually(lambda: replica.engine.load().running == 20)
    sizes = [len(gateway.read().outputs) for _ in range(40)]
    assert sizes[-1] == 20


def test_abort(start: Start, join: Join) -> None:
    replica = start(SLOW)
    gateway = join(replica)
    gateway.add("a", max_tokens=10_000)
    gateway.add("b", max_tokens=10_000)
    eventually(lambda: replica.requests == 2)
    gateway.requests.send_multipart([MessageKind.ABORT, msgspec.msgpack.encode(["a", "unknown"])])
    eventually(lambda: replica.requests == 1)


def test_bye_drops_what_is_in_flight(start: Start, join: Join) -> None:
    replica = start(SLOW)
    staying, leaving = join(replica), join(replica)
    staying.add("a", max_tokens=10_000)
    leaving.add("a", max_tokens=10_000)
    eventually(lambda: replica.requests == 2)
    leaving.requests.send_multipart([MessageKind.BYE])
    eventually(lambda: replica.requests == 1)
    assert replica.server.gateways == 1
    leaving.add("b")
    assert leaving.requests.recv_multipart() == [REFUSED, b"say hello first"]


def test_a_gateway_that_vanishes_loses_its_requests(start: Start, join: Join) -> None:
    replica = start(SLOW)
    staying, vanishing = join(replica), join(replica)
    staying.add("a", max_tokens=10_000)
    vanishing.add("a", max_tokens=10_000)
    vanishing.read()
    vanishing.close()
    eventually(lambda: replica.requests == 1)
    assert replica.server.gateways == 1
    # The one that stayed goes on.
    while staying.outputs.poll(0):
        staying.read()
    staying.read()


def test_a_gateway_that_has_no_output_connection_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CONNECT_GRACE_S", 0.1)
    replica = start(SLOW)
    with zmq.Context() as context, context.socket(zmq.DEALER) as requests:
        show_credentials(requests, replica.address)
        requests.connect(replica.address.requests)
        requests.send_multipart([MessageKind.HELLO, replica.address.token.encode()])
        assert requests.recv_multipart()[0] == READY
        request = messages.EngineCoreRequest(
            request_id="a", prompt_token_ids=[1], sampling_params=messages.SamplingParams(), arrival_time=0.0
        )
        requests.send_multipart([MessageKind.ADD, *messages.encode(request)])
        eventually(lambda: replica.server.gateways == 0)
        assert replica.requests == 0


def test_a_gateway_that_does_not_read_holds_up_nobody(
    start: Start, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "OUTPUT_BACKLOG", 5)
    replica = start(Simulated(realtime=False, max_model_len=32_000, max_num_seqs=256))
    # A message of 250 streams is some 10 KB, so the kernel's buffers are full soon.
    stuck = join(replica, receive_buffer=4096)
    for number in range(250):
        stuck.add(str(number) * 10, max_tokens=30_000)
    reading = join(replica)
    eventually(lambda: replica.server.gateways == 1)
    # Dropped in the engine too; what the other one asks for is answered.
    eventually(lambda: replica.requests == 0)
    reading.add("a")
    assert reading.finish(1) == {"a": predicted([1, 2, 3], 4, FAST)}


def test_control_calls_are_an_allowlist(start: Start, join: Join) -> None:
    gateway = join(start(FAST))
    gateway.call(1, "collective_rpc", "anything")
    gateway.call(2, "shutdown")
    gateway.call(3, "get_supported_tasks")
    # Only the third is answered; the engine never heard of the others.
    output = gateway.read().utility_output
    assert output is not None
    assert (output.call_id, output.failure_message, output.result) == (3, None, (None, ["generate"]))


def test_an_allowed_call_that_the_engine_refuses_is_answered(start: Start, join: Join) -> None:
    gateway = join(start(FAST))
    gateway.call(1, "sleep", 1)
    output = gateway.read().utility_output
    assert output is not None
    assert "sleep" in (output.failure_message or "")


@pytest.mark.parametrize(
    "message",
    [
        [b""],
        [b"\xff"],
        [b"no such kind"],
        [MessageKind.HELLO],
        [MessageKind.ADD],
        [MessageKind.ADD, b"\xc1"],
        [MessageKind.ABORT],
        [MessageKind.ABORT, b"\xc1"],
        [MessageKind.ABORT, msgspec.msgpack.encode({"a": 1})],
        [MessageKind.CALL, msgspec.msgpack.encode([1])],
        [MessageKind.CALL, msgspec.msgpack.encode(["one", "sleep", []])],
        [b"x", b"y", b"z"],
        [PARTS],
        [PARTS, b"\xc1"],
        [PARTS, msgspec.msgpack.encode([1]), b"xy"],
        [PARTS, msgspec.msgpack.encode([1]), PARTS],
    ],
)
def test_malformed_messages_are_dropped(start: Start, join: Join, message: list[bytes]) -> None:
    replica = start(FAST)
    gateway, stranger = join(replica), join(replica, hello=False)
    for sender in (stranger, gateway):
        sender.requests.send_multipart(message)
    gateway.add("after")
    assert gateway.finish(1) == {"after": predicted([1, 2, 3], 4, FAST)}


def test_whatever_the_engine_raises_the_others_are_served(
    start: Start, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = start(FAST)
    gateway = join(replica)
    add = replica.engine.add

    def fail_once(client: int, frames: Any) -> None:
        monkeypatch.setattr(replica.engine, "add", add)
        raise RuntimeError("as torch raises for a bad tensor")

    monkeypatch.setattr(replica.engine, "add", fail_once)
    gateway.add("bad")
    gateway.add("good")
    assert list(gateway.finish(1)) == ["good"]


def test_a_request_that_cannot_be_served_ends_with_an_error(start: Start, join: Join) -> None:
    gateway = join(start(FAST))
    gateway.add("too long", prompt=tuple(range(FAST.max_model_len)))
    (output,) = gateway.read().outputs
    assert (output.request_id, output.finish_reason) == ("too long", FinishReason.ERROR)


def test_every_gateway_hears_that_the_engine_ended(start: Start, join: Join) -> None:
    replica = start(SLOW)
    gateways = [join(replica), join(replica)]
    for gateway in gateways:
        gateway.add("a", max_tokens=10_000)
        gateway.read()
    replica.die()
    for gateway in gateways:
        while (frames := gateway.outputs.recv_multipart()) != [b""]:
            assert messages.decode_outputs(frames).outputs


def test_ports_come_from_the_range(start: Start) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as taken:
        first = taken.bind_to_random_port("tcp://127.0.0.1", 20_000, 60_000)
        ports = DataPlane(port_min=first, port_max=first)
        with pytest.raises(SettingsError, match=rf"no port to bind on 127.0.0.1 from {first} to {first}: .*in use"):
            EngineServer(start(FAST).engine, replica_id="r", model="m", host="127.0.0.1", ports=ports)
        engine = SimulatedEngine(FAST)
        ports = DataPlane(port_min=first, port_max=first + 50)
        server = EngineServer(engine, replica_id="r", model="m", host="127.0.0.1", ports=ports)
        for endpoint in (server.address.requests, server.address.outputs):
            assert first < int(endpoint.rpartition(":")[2]) <= first + 50
    engine.shutdown()
    server.close()


def test_an_address_of_another_machine_is_refused(start: Start) -> None:
    with pytest.raises(SettingsError, match=r"data_plane: no port to bind on 192\.0\.2\.1"):
        EngineServer(start(FAST).engine, replica_id="r", model="m", host="192.0.2.1", ports=DataPlane())


def test_addresses_and_tokens_differ(start: Start) -> None:
    one, two = start(FAST).address, start(FAST).address
    assert len({one.requests, one.outputs, two.requests, two.outputs}) == 4
    assert one.token != two.token


def test_what_is_for_no_gateway_in_particular_goes_to_one_of_them(start: Start, join: Join) -> None:
    replica = start(FAST)
    gateways = [join(replica), join(replica)]
    replica.engine.call(NO_CLIENT, 7, "no_such_method", [])
    poller = zmq.Poller()
    for gateway in gateways:
        poller.register(gateway.outputs, zmq.POLLIN)
    (heard,) = dict(poller.poll(5000))
    (gateway,) = (gateway for gateway in gateways if gateway.outputs is heard)
    answer = gateway.read().utility_output
    assert answer is not None
    assert answer.call_id == 7


class Talking(SimulatedEngine):
    """A rank that has something to say to the others, and keeps what it hears."""

    def __init__(self) -> None:
        super().__init__(FAST)
        self.heard: list[list[bytes]] = []

    def say(self, *frames: bytes) -> None:
        self._messages.put((SIBLINGS, frames))

    def hear(self, frames: Sequence[Any]) -> None:
        self.heard.append([bytes(frame) for frame in frames])


@pytest.fixture
def group() -> Iterator[list[tuple[Talking, EngineServer]]]:
    """Three ranks that know each other."""
    engines = [Talking() for _ in range(3)]
    servers = [
        EngineServer(engine, replica_id=f"r{rank}", model="m", host="127.0.0.1", ports=DataPlane())
        for rank, engine in enumerate(engines)
    ]
    for own in servers:
        own.join([other.address for other in servers if other is not own])
    yield list(zip(engines, servers, strict=True))
    for engine, server in zip(engines, servers, strict=True):
        engine.shutdown()
        server.close()


def test_a_rank_is_heard_by_the_others(group: list[tuple[Talking, EngineServer]]) -> None:
    (one, server), (two, _), (three, _) = group
    one.say(b"wave", b"7")
    one.say(b"wave", b"8")
    two.say(b"mine")
    told = [[b"wave", b"7"], [b"wave", b"8"]]
    eventually(lambda: two.heard == told and len(three.heard) == 3)
    assert [frames for frames in three.heard if frames != [b"mine"]] == told
    eventually(lambda: one.heard == [[b"mine"]])
    assert server.gateways == 0, "a rank is no gateway"


def test_only_a_rank_that_knows_the_token_is_heard(group: list[tuple[Talking, EngineServer]]) -> None:
    engine, server = group[0]
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    show_credentials(sock, server.address)
    sock.connect(server.address.requests)
    for token in (b"", b"wrong", server.address.token.encode()):
        sock.send_multipart([MessageKind.SIBLING, token, token])
    eventually(lambda: bool(engine.heard))
    assert engine.heard == [[server.address.token.encode()]]
    context.destroy(linger=0)


def test_whoever_waits_for_the_end_of_an_engine_is_told(start: Start) -> None:
    replica = start(FAST)
    waiting = threading.Thread(target=replica.server.wait_until_ended)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    replica.die()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


CLOSED_BY_TWO = """
import threading
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedReplica
for _ in range(20):
    replica = SimulatedReplica(Simulated(realtime=False))
    closing = [threading.Thread(target=replica.close) for _ in range(3)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
"""


def test_two_may_close_it_at_once() -> None:
    """In a process of its own, which libzmq would abort."""
    command = [sys.executable, "-c", CLOSED_BY_TWO]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, "")
