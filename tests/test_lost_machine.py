"""A machine vanishes without a word: whoever was connected to it notices within the seconds that the settings say.

Real sockets over a cable that is pulled, simulated engines. What the kernel closes itself, because a process has died,
is in the tests of each module.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pytest

from hycluster.core import ReplicaAddress
from hycluster.directory.directory import ReplicaReport
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import HyclusterError
from hycluster.gateway.connection import HELLO_TIMEOUT_S
from hycluster.gateway.router import make_policy
from hycluster.ingress.ports import bind, notice_lost_callers
from hycluster.replica.wire import EngineServer
from hycluster.settings.load import DataPlane
from hycluster.settings.simulated import Simulated
from tests.cable import Cable, cable
from tests.engine_requests import PROMPT, ask
from tests.ingress.stand_in import MODEL, StandInGenerator, open_ingress
from tests.simulated_pool import predicted
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SETTINGS = Simulated(step_base_s=0.01, decode_token_s=0.0)
LOST_AFTER_S = 2.0
STALLED_S = 3.0
# The tests' own looks, and what a busy machine takes; the kernel by itself takes a quarter of an hour.
SLACK_S = 20.0

# Holds an engine; says where, then does what each line of its standard input tells it to.
REPLICA = """
import ctypes, json, sys
from dataclasses import asdict
from hycluster.settings.load import DataPlane
from hycluster.settings.simulated import Simulated
from hycluster.engine.simulated import SimulatedEngine
from hycluster.replica.wire import EngineServer
host, settings, ports = sys.argv[1], Simulated(**json.loads(sys.argv[2])), DataPlane(**json.loads(sys.argv[3]))
engine = SimulatedEngine(settings)
server = EngineServer(engine, replica_id="far", model="tiny", host=host, ports=ports)
print(json.dumps(asdict(server.address)), flush=True)
for line in sys.stdin:
    # Without letting go of Python's lock, as some C extensions do.
    ctypes.PyDLL(None).usleep(int(float(line) * 1e6))
    print("awake", flush=True)
"""

GATEWAY = """
import json, sys, time
from hycluster.core import ReplicaAddress
from tests.replica.test_wire import RawGateway
gateway = RawGateway(ReplicaAddress(**json.loads(sys.argv[1])))
gateway.hello()
gateway.add("r", max_tokens=100_000)
gateway.read()
print("reads", flush=True)
sys.stdin.read()
"""

CALLER = """
import sys
from hycluster.client import Client
with Client(sys.argv[1]) as client:
    for delta in client.stream(sys.argv[2], prompt="x", max_tokens=100_000):
        print("hears", flush=True)
"""


@pytest.fixture(scope="module")
def far() -> Iterator[Cable]:
    with cable() as made:
        yield made


@pytest.fixture(autouse=True)
def _plugged_in(far: Cable) -> Iterator[None]:
    yield
    far.plug_in()


def server(host: str, settings: Simulated = SETTINGS, replica_id: str = "near") -> tuple[SimulatedEngine, EngineServer]:
    engine = SimulatedEngine(settings)
    ports = DataPlane(host=host, lost_after_s=LOST_AFTER_S)
    return engine, EngineServer(engine, replica_id=replica_id, model="tiny", host=host, ports=ports)


def far_replica(far: Cable, lost_after_s: float = LOST_AFTER_S) -> Any:
    ports = {"host": far.there, "lost_after_s": lost_after_s}
    return far.process(REPLICA, far.there, SETTINGS.model_dump_json(), json.dumps(ports))


@asynccontextmanager
async def pool() -> AsyncIterator[tuple[Any, dict[str, str]]]:
    from hycluster.gateway.pool import PoolClient

    lost: dict[str, str] = {}

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        lost[request_id] = error.message

    policy = make_policy("least_outstanding_tokens", "me", seed=0)
    client = PoolClient("tiny", policy, "me", wait_s=30, on_lost=on_lost)
    try:
        yield client, lost
    finally:
        await client.close()


async def finish(client: Any) -> tuple[list[int], float]:
    """The tokens of the only request, and the longest pause between two of them."""
    tokens: list[int] = []
    last, pause = time.monotonic(), 0.0
    while True:
        for output in (await client.get_output_async()).outputs:
            now = time.monotonic()
            last, pause = now, max(pause, now - last)
            tokens += output.new_token_ids
            if output.finish_reason is not None:
                return tokens, pause


@pytest.mark.usefixtures("vllm_imported")
async def test_streams_of_a_replica_whose_machine_is_gone_go_on(far: Cable) -> None:
    engine, near = server("127.0.0.1")
    with far_replica(far) as process:
        there = ReplicaAddress(**json.loads(process.stdout.readline()))
        async with pool() as (client, lost):
            # The far one first, so that it is the one that has the request.
            await client.update([ReplicaReport(there, engine.load())])
            await client.add_request_async(ask("a", max_tokens=400))
            await client.get_output_async()
            await client.update([ReplicaReport(near.address, engine.load())])
            assert client.outstanding["near"] == 0
            far.pull()
            tokens, pause = await finish(client)
            # The first one has been read above.
            assert tokens == predicted(PROMPT, 400, SETTINGS)[-len(tokens) :]
            assert LOST_AFTER_S / 2 < pause < LOST_AFTER_S + SLACK_S
            assert (client.outstanding.keys(), lost) == ({"near"}, {})
            # The directory names it for some seconds more. Nobody waits for it: what else there is to know comes on.
            began = time.monotonic()
            reports = [ReplicaReport(there, engine.load()), ReplicaReport(near.address, engine.load(), accepting=False)]
            await client.update(reports)
            assert time.monotonic() - began < HELLO_TIMEOUT_S / 2
            assert not client.able
        print(f"lost machine: the stream paused for {pause:.1f} s")
    engine.shutdown()
    near.close()


@pytest.mark.usefixtures("vllm_imported")
async def test_a_replica_whose_process_stands_still_is_not_lost(far: Cable) -> None:
    with far_replica(far, lost_after_s=1) as process:
        there = ReplicaAddress(**json.loads(process.stdout.readline()))
        async with pool() as (client, lost):
            await client.update([ReplicaReport(there, SimulatedEngine(SETTINGS).load())])
            await client.add_request_async(ask("a", max_tokens=50))
            process.stdin.write("3\n")
            process.stdin.flush()
            tokens, pause = await finish(client)
        assert pause > 2
        assert (tokens, lost) == (predicted(PROMPT, 50, SETTINGS), {})


def test_requests_of_a_gateway_whose_machine_is_gone_are_dropped(far: Cable) -> None:
    engine, near = server(far.here)
    with far.process(GATEWAY, json.dumps(asdict(near.address))) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        assert engine.load().running == 1
        far.pull()
        eventually(lambda: engine.load().running == 0, LOST_AFTER_S + SLACK_S)
        assert near.gateways == 0
    engine.shutdown()
    near.close()


def test_a_rank_whose_machine_is_gone_is_missed(far: Cable) -> None:
    engine, near = server(far.here)
    missed: list[str] = []
    with far_replica(far) as process:
        near.join([ReplicaAddress(**json.loads(process.stdout.readline()))], missed.append)
        time.sleep(1)
        assert missed == []
        far.pull()
        eventually(lambda: missed == ["far"], LOST_AFTER_S + SLACK_S)
    engine.shutdown()
    near.close()


async def test_a_grpc_caller_whose_machine_is_gone_is_given_up(far: Cable) -> None:
    generator = StandInGenerator()
    generator.pause_s = 0.05
    async with open_ingress(generator, host=far.here, stalled_client_timeout_s=STALLED_S) as ingress:
        with far.process(CALLER, f"{far.here}:{ingress.port}", MODEL) as process:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "hears\n"
            far.pull()
            async with asyncio.timeout(STALLED_S + SLACK_S):
                while generator.running:  # noqa: ASYNC110 - what is waited for has no event
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("speaks", [True, False])
async def test_an_http_caller_whose_machine_is_gone_is_given_up(far: Cable, speaks: bool) -> None:
    """Of the ingress process's socket only, as the HTTP ingress has it: all of the rest is uvicorn's."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while speaks:
                writer.write(b"word ")
                await writer.drain()
                await asyncio.sleep(0.05)
            await reader.read()
        except OSError:
            pass
        ended.set()
        writer.close()

    sock = bind(far.here, 0, "http.port")
    notice_lost_callers(sock, STALLED_S)
    async with await asyncio.start_server(serve, sock=sock):
        script = (
            "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])));"
            + ("s.recv(1); print('hears', flush=True); s.recv(1 << 20); sys.stdin.read()") * speaks
            + "print('hears', flush=True); sys.stdin.read()" * (not speaks)
        )
        with far.process(script, far.here, str(sock.getsockname()[1])) as process:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "hears\n"
            far.pull()
            await asyncio.wait_for(ended.wait(), STALLED_S + SLACK_S)
