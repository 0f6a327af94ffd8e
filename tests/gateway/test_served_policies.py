"""Policies that go by KV blocks in a pool's client, against real sockets and simulated engines that tell of theirs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import GatewayWork
from hycluster.directory.directory import Directory
from hycluster.engine.block_changes import NAME_BYTES, encode_changes
from hycluster.engine.protocol import BlockNaming, Frame
from hycluster.engine.simulated import SimulatedEngine
from hycluster.errors import HyclusterError
from hycluster.gateway.router import make_policy
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.gateway.test_block_names import request
from tests.simulated_pool import SimulatedPool
from tests.waiting import eventually, until

if TYPE_CHECKING:
    from hycluster.gateway.pool import PoolClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

SLOW = Simulated(step_base_s=0.01, decode_token_s=0.0)
NAMING = BlockNaming(SLOW.block_size_tokens, "sha256", b"root")
MODEL = Model(name="tiny", source="nowhere", simulated=SLOW)


class TellingEngine(SimulatedEngine):
    """Has the blocks of each prompt from when it comes, and drops none."""

    def __init__(self, settings: Simulated) -> None:
        from hycluster.gateway.block_names import BlockNamer

        self._namer, self._names, self._followers = BlockNamer(), set[bytes](), set[int]()
        super().__init__(settings)
        self.info = replace(self.info, blocks=NAMING)

    def follow_blocks(self, client: int) -> None:
        self._followers.add(client)
        self._messages.put((client, [encode_changes(1, self._names, whole=True)]))

    def add(self, client: int, frames: Sequence[Frame]) -> None:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder

        asked = MsgpackDecoder(EngineCoreRequest).decode(list(frames))
        names = {name.to_bytes(NAME_BYTES, "big") for name in self._namer.names(asked, NAMING).tolist()}
        if new := names - self._names:
            self._names |= new
            for follower in self._followers:
                self._messages.put((follower, [encode_changes(1, new)]))
        super().add(client, frames)


class Gateways:
    """Of one pool; they hear of each other only by :meth:`report`."""

    def __init__(self, replicas: SimulatedPool) -> None:
        self.replicas = replicas
        self.directory = Directory()
        self.clients: list[PoolClient] = []
        self.count = 0

    async def report(self) -> None:
        """As it is twice a second."""
        for report in self.replicas.reports:
            self.directory.report(MODEL, report)
        for client in self.clients:
            self.directory.sync("tiny", client.gateway_id, client.outstanding, work=client.work)
        for client in self.clients:
            await client.update(self.directory.view("tiny").replicas)

    async def ask(self, client: PoolClient, prompt: list[int], max_tokens: int = 2) -> str:
        """The replica that it goes to."""
        from vllm.sampling_params import SamplingParams

        name, self.count = f"q{self.count}", self.count + 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        await client.add_request_async(request(request_id=name, prompt_token_ids=prompt, sampling_params=params))
        return client._failover.flights[name].replica_id

    def hang(self) -> None:
        """Engines take requests and compute nothing, so that what is chosen does not go by how busy a machine is."""
        for replica in self.replicas.replicas:
            replica.engine.hang()

    async def finish(self) -> None:
        """All that is on its way."""
        for client in self.clients:
            while client.requests_in_flight:
                await client.get_output_async()

    async def known(self) -> None:
        """Each gateway has heard all that replicas have."""
        engines: list[Any] = [replica.engine for replica in self.replicas.replicas]
        held = sum(len(engine._names) for engine in engines)
        for client in self.clients:
            assert client.prefixes is not None
            await until(lambda prefixes=client.prefixes: prefixes.blocks == held)  # type: ignore[misc]


@asynccontextmanager
async def opened(policy: str, gateways: int = 1, replicas: int = 2) -> AsyncIterator[Gateways]:
    from hycluster.gateway.pool import PoolClient
    from hycluster.gateway.prefixes import Prefixes

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        raise AssertionError(request_id, error)

    with SimulatedPool(SLOW, replicas, TellingEngine) as simulated:
        pool = Gateways(simulated)
        try:
            for number in range(gateways):
                made = make_policy(policy, f"g{number}", seed=number, session_slack_tokens=8192)
                pool.clients.append(
                    PoolClient("tiny", made, f"g{number}", wait_s=30, prefixes=Prefixes(), on_lost=on_lost)
                )
            await pool.report()
            yield pool
        finally:
            for client in pool.clients:
                await client.close()


def prompt(seed: int, tokens: int = 640) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(30_000) for _ in range(tokens)]


@pytest.mark.parametrize("policy", ["predicted_ttft", "longest_match", "lmetric", "dynamo", "prefix_hash"])
async def test_a_conversation_goes_on_where_it_was_by_whichever_gateway(policy: str) -> None:
    async with opened(policy, gateways=2, replicas=3) as pool:
        for conversation in range(6):
            turns, homes = prompt(conversation, 1100), set()
            for turn in range(4):
                turns = [*turns, *prompt(1000 + turn, 50)]
                homes.add(await pool.ask(pool.clients[turn % 2], turns))
                await pool.finish()
                await pool.known()
            assert len(homes) == 1


async def test_conversations_that_come_at_once_are_spread() -> None:
    async with opened("predicted_ttft") as pool:
        pool.hang()
        (client,) = pool.clients
        homes = [await pool.ask(client, prompt(number)) for number in range(12)]
        assert sorted(homes) == ["r0"] * 6 + ["r1"] * 6
        await client.abort_requests_async([*client._failover.flights])
        assert client.work == dict.fromkeys(["r0", "r1"], GatewayWork())


async def test_a_burst_at_two_gateways_does_not_run_to_one_replica() -> None:
    """One replica has their common beginning. What a gateway sends it counts at once, what others send by reports."""
    async with opened("predicted_ttft", gateways=2) as pool:
        one, other = pool.clients
        shared = prompt(1)
        home = await pool.ask(one, shared)
        await pool.finish()
        await pool.known()
        await pool.report()
        pool.hang()
        for client in (one, other):
            homes = [await pool.ask(client, [*shared, *prompt(100 + number, 320)], 1000) for number in range(20)]
            assert client is other or homes[0] == home
            assert 5 <= homes.count(home) <= 15
        # One that has sent nothing knows of both.
        fresh = await third(pool)
        told = fresh._members.links[home].load
        assert told is not None
        sent = {client.gateway_id: (client.work or {})[home] for client in (one, other)}
        assert {gateway: work for gateway, work in told.work.items() if work.requests} == sent
        assert all(work.prefill_tokens > 1000 and work.requests >= 5 for work in sent.values())
        for client in (one, other):
            await client.abort_requests_async([*client._failover.flights])
            assert client.work == dict.fromkeys(["r0", "r1"], GatewayWork())


async def third(pool: Gateways) -> PoolClient:
    from hycluster.gateway.pool import PoolClient
    from hycluster.gateway.prefixes import Prefixes

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        raise AssertionError(request_id, error)

    fresh = PoolClient(
        "tiny", make_policy("predicted_ttft", "g9", seed=9), "g9", wait_s=30, prefixes=Prefixes(), on_lost=on_lost
    )
    pool.clients.append(fresh)
    # Of one that it connects to it hears with the next report.
    await pool.report()
    await pool.report()
    return fresh


async def test_when_its_replica_dies_a_conversation_goes_on_elsewhere() -> None:
    async with opened("predicted_ttft") as pool:
        (client,) = pool.clients
        home = await pool.ask(client, prompt(1), 1000)
        await asyncio.to_thread(eventually, lambda: any(replica.requests for replica in pool.replicas.replicas))
        (lost,) = (replica for replica in pool.replicas.replicas if replica.address.replica_id == home)
        lost.die()
        await until(lambda: client.outstanding.keys() == {"r0", "r1"} - {home})
        await until(lambda: not client.requests_waiting)
        (left,) = client.work or {}
        assert (client.work or {})[left].requests == 1
        await client.abort_requests_async([*client._failover.flights])


async def test_engines_that_tell_nothing_are_chosen_by_load() -> None:
    from hycluster.gateway.pool import PoolClient
    from hycluster.gateway.prefixes import Prefixes

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        raise AssertionError(request_id, error)

    with SimulatedPool(SLOW, 2) as simulated:
        for replica in simulated.replicas:
            replica.engine.hang()
        client = PoolClient(
            "tiny", make_policy("predicted_ttft", "me", seed=0), "me", wait_s=30, prefixes=Prefixes(), on_lost=on_lost
        )
        try:
            await client.update(simulated.reports)
            for number in range(8):
                await client.add_request_async(request(request_id=str(number)))
            assert [len(link.flights) for link in client._members.links.values()] == [4, 4]
        finally:
            await client.close()
