"""The pool's client while replicas are replaced, and with failover switched off. Real sockets, simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hycluster.errors import HyclusterError
from hycluster.gateway.router import make_policy
from hycluster.settings.simulated import Simulated
from tests.engine_requests import PROMPT, ask
from tests.simulated_pool import SimulatedPool, predicted
from tests.waiting import PATIENCE_S

if TYPE_CHECKING:
    from hycluster.gateway.pool import PoolClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

SLOW = Simulated(step_base_s=0.01, decode_token_s=0.0)


@asynccontextmanager
async def client_of(pool: SimulatedPool, lost: dict[str, str], *, failover: bool = True) -> AsyncIterator[PoolClient]:
    from hycluster.gateway.pool import PoolClient

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        lost[request_id] = type(error).__name__

    policy = make_policy("least_outstanding_tokens", "me", seed=0)
    client = PoolClient("tiny", policy, "me", wait_s=60, failover=failover, on_lost=on_lost)
    try:
        await client.update(pool.reports)
        yield client
    finally:
        await client.close()


async def outputs(client: PoolClient, tokens: dict[str, list[int]]) -> None:
    for output in (await client.get_output_async()).outputs:
        tokens[output.request_id].extend(output.new_token_ids)


async def begin(client: PoolClient, max_tokens: int) -> dict[str, list[int]]:
    """Two requests, each on a replica of its own and with output of it; their tokens so far."""
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for name in tokens:
        await client.add_request_async(ask(name, max_tokens))
    while not all(tokens.values()):
        await outputs(client, tokens)
    return tokens


async def test_what_a_replica_that_ends_has_in_work_goes_on_elsewhere() -> None:
    lost: dict[str, str] = {}
    with SimulatedPool(SLOW, 2) as pool:
        async with client_of(pool, lost) as client:
            tokens = await begin(client, 60)
            # As a replica does at the end of its drain.
            pool[0].accepting = False
            await client.update(pool.reports)
            await asyncio.to_thread(pool[0].engine.shutdown)
            while any(len(got) < 60 for got in tokens.values()):
                await outputs(client, tokens)
            assert client.requests_in_flight == 0
    assert lost == {}
    assert list(tokens.values()) == [predicted(PROMPT, 60, SLOW)] * 2


async def test_without_failover_what_has_begun_ends_at_once() -> None:
    lost: dict[str, str] = {}
    with SimulatedPool(SLOW, 2) as pool:
        async with client_of(pool, lost, failover=False) as client:
            tokens = await begin(client, 100)
            (victim,) = client._members.links["r0"].flights
            assert client._failover.flights[victim].output == [], "nobody needs them"
            pool[0].die()
            async with asyncio.timeout(PATIENCE_S):
                while not lost:
                    await outputs(client, tokens)
            assert lost == {victim: "ReplicaLost"}
            (other,) = client._failover.flights
            while len(tokens[other]) < 100:
                await outputs(client, tokens)


async def test_a_successor_is_there_before_its_predecessor_takes_no_more() -> None:
    with SimulatedPool(SLOW, 1) as pool, SimulatedPool(SLOW, 1) as successors:
        async with client_of(pool, {}) as client:
            pool[0].accepting = False
            there = successors[0].report
            successor = replace(there, address=replace(there.address, replica_id="successor"))
            updating = asyncio.create_task(client.update([*pool.reports, successor]))
            while not updating.done():
                assert client.able
                await asyncio.sleep(0)
            assert {name for name, link in client._members.links.items() if link.accepting} == {"successor"}
