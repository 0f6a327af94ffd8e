"""Two gateways that follow the KV blocks of real engines, in this process: what they predict is what is found."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hycluster.adapters import adapter_id
from hycluster.core import Priority
from hycluster.directory.directory import ReplicaReport
from hycluster.errors import HyclusterError
from hycluster.gateway.router import Candidate, RouteRequest
from hycluster.replica.wire import EngineServer
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Adapter, Model
from hycluster.settings.pool import Hardware
from tests.engine.test_cached_blocks import conversations
from tests.gateway.test_block_names import request
from tests.lora_adapters import attention_of, write_adapter

if TYPE_CHECKING:
    from hycluster.gateway.pool import PoolClient
    from hycluster.gateway.prefixes import Prefixes

# A first engine in a process imports what warns of third parties' sins.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore"),
              pytest.mark.usefixtures("vllm_imported")]  # fmt: skip

BLOCK_TOKENS = 32
# A token of the tiny model in the KV cache is 1 KiB.
KV_GIB = 2048 * 1024 / 2**30
CONVERSATIONS, TURNS, SYSTEM_TOKENS, TURN_TOKENS = 8, 4, 200, 180
LOOPBACK = DataPlane(host="127.0.0.1")


class AnyReplica:
    """A policy."""

    def __init__(self) -> None:
        self.chance = random.Random(8)

    def choose(self, candidates: Any, request: RouteRequest) -> str:
        chosen: Candidate = self.chance.choice(candidates)
        return chosen.replica_id


class Replicas:
    """Real engines, and gateways that are told of them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.running: dict[str, tuple[Any, EngineServer]] = {}
        self.gateways: list[PoolClient] = []
        self.count = self.sent = 0

    async def start(self) -> None:
        from hycluster.engine.vllm import VllmEngine

        engine = await asyncio.to_thread(VllmEngine, self.model, self.model.source)
        name, self.count = f"r{self.count}", self.count + 1
        server = EngineServer(engine, replica_id=name, model="tiny", host="127.0.0.1", ports=LOOPBACK)
        self.running[name] = engine, server
        await self.report()

    async def report(self) -> None:
        for gateway in self.gateways:
            await gateway.update(
                [ReplicaReport(server.address, engine.load(), True) for engine, server in self.running.values()]
            )

    async def die(self, name: str) -> None:
        """As an engine does that meets an error in a step."""
        engine, server = self.running.pop(name)
        engine._core.schedule = engine._core.step_fn = _die
        engine.probe()
        await asyncio.to_thread(server.wait_until_ended)
        await asyncio.to_thread(server.close)
        await until(lambda: all(name not in gateway.outstanding for gateway in self.gateways))

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.close()
        for engine, server in self.running.values():
            await asyncio.to_thread(engine.shutdown)
            await asyncio.to_thread(server.close)

    def held(self, name: str) -> set[int]:
        pool = self.running[name][0]._core.scheduler.kv_cache_manager.block_pool
        return {int.from_bytes(key[-12:-4], "big") for key in pool.cached_block_hash_to_block._cache}

    async def known(self) -> None:
        """Wait until every gateway knows what engines that are idle have."""
        for gateway in self.gateways:
            prefixes = gateway.prefixes
            assert prefixes is not None
            for name in self.running:
                await until(lambda: name in prefixes._naming)  # noqa: B023
                await until(lambda: holds(prefixes, name, self.held(name)))  # noqa: B023

    async def ask(self, gateway: PoolClient, **asked: Any) -> None:
        self.sent += 1
        await gateway.add_request_async(request(request_id=f"q{self.sent}", **asked))

    async def finish(self, gateway: PoolClient, requests: int = 1) -> None:
        while requests:
            outputs = (await gateway.get_output_async()).outputs
            requests -= sum(output.finish_reason is not None for output in outputs)


def holds(prefixes: Prefixes, name: str, blocks: set[int]) -> bool:
    """It is known that a replica holds these blocks and no others."""
    index = prefixes._index
    if index is None or index.held_by(name) != len(blocks):
        return False
    row = index.replica_ids.index(name)
    return all(index.cached_blocks(np.array([block], np.uint64))[row] for block in blocks)


def _die(*_: Any) -> Any:
    raise RuntimeError("killed")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - tests look from outside
            await asyncio.sleep(0.005)


@asynccontextmanager
async def opened(folder: Path, replicas: int, kv_gib: float, adapters: dict[str, Path]) -> AsyncIterator[Replicas]:
    from hycluster.gateway.pool import PoolClient
    from hycluster.gateway.prefixes import Prefixes

    model = Model(
        name="tiny",
        source=str(folder),
        adapters=tuple(Adapter(name=name, source=str(path)) for name, path in adapters.items()),
        engine={"max_model_len": 1024, "max_num_seqs": 8, "block_size": BLOCK_TOKENS},
        hardware=Hardware(kv_cache_gib=kv_gib),
    )
    lost: list[str] = []

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        lost.append(f"{request_id}: {error}")

    pool = Replicas(model)
    try:
        for name in ("one", "two"):
            pool.gateways.append(
                PoolClient("tiny", AnyReplica(), name, wait_s=30, prefixes=Prefixes(), on_lost=on_lost)
            )
        for _ in range(replicas):
            await pool.start()
        yield pool
        assert not lost
    finally:
        await pool.close()


def errors(pool: Replicas) -> tuple[int, int]:
    audits = [gateway.prefixes.audit for gateway in pool.gateways if gateway.prefixes is not None]
    return sum(audit.missing_tokens for audit in audits), sum(audit.unforeseen_tokens for audit in audits)


def predictions(pool: Replicas) -> int:
    return sum(gateway.prefixes.audit.predictions for gateway in pool.gateways if gateway.prefixes is not None)


async def test_the_error_is_0(tiny_model: Path, tmp_path: Path) -> None:
    """One request after the other, by either gateway, with evictions, adapters, salts, deaths, restarts and resets."""
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    requests, chance = 100, random.Random(9)
    shapes = attention_of(2, 64)
    adapters = {name: write_adapter(tmp_path / name, shapes, seed=seed) for seed, name in enumerate("ab")}
    loras = [LoRARequest(name, adapter_id(name, str(path)), str(path)) for name, path in adapters.items()]
    async with opened(tiny_model, 2, KV_GIB, adapters) as pool:
        for number, prompt in enumerate(conversations(chance, requests)):
            await pool.known()
            gateway = chance.choice(pool.gateways)
            await pool.ask(
                gateway,
                prompt_token_ids=prompt,
                lora_request=chance.choice([None, None, *loras]),
                cache_salt=chance.choice([None, None, "x", "y"]),
                sampling_params=SamplingParams(
                    max_tokens=chance.randrange(1, 20),
                    temperature=0,
                    ignore_eos=True,
                    prompt_logprobs=0 if chance.random() < 0.05 else None,
                ),
            )
            await pool.finish(gateway)
            if number % 50 == 15:
                await pool.die(chance.choice([*pool.running]))
                await pool.start()
            elif number % 50 == 25:
                assert await gateway.call_all("reset_prefix_cache") == [True, True]
                await pool.known()
                assert gateway.prefixes is not None
                assert gateway.prefixes.blocks == 0
            elif number % 50 == 40:
                await gateway.call_all("sleep", 1)
                await gateway.call_all("wake_up")
        assert predictions(pool) == requests
        assert errors(pool) == (0, 0)
        found = sum(gateway.prefixes.audit.cached_tokens for gateway in pool.gateways if gateway.prefixes is not None)
        assert found > 500


async def test_the_error_is_0_beside_each_other(tiny_model: Path) -> None:
    """What waits and what runs at the same gateway is counted on; nothing has to be evicted here."""
    from vllm.sampling_params import SamplingParams

    chance = random.Random(10)
    async with opened(tiny_model, 1, 40 * KV_GIB, {}) as pool:
        gateway = pool.gateways[0]
        shared = [chance.randrange(250) for _ in range(400)]
        await pool.known()
        for _ in range(10):
            for _ in range(6):
                prompt = shared[: chance.randrange(40, 400)] + [chance.randrange(250) for _ in range(50)]
                params = SamplingParams(max_tokens=chance.randrange(1, 20), temperature=0, ignore_eos=True)
                await pool.ask(gateway, prompt_token_ids=prompt, sampling_params=params)
            await pool.finish(gateway, 6)
        assert (predictions(pool), errors(pool)) == (60, (0, 0))


async def hits(pool: Replicas, policy: str) -> int:
    """Tokens that engines find cached for conversations with one system prompt, turn by turn.

    One request after the other: two engines that compute at once in one process end it.
    """
    from vllm.sampling_params import SamplingParams

    from hycluster.gateway.pool import PoolClient
    from hycluster.gateway.prefixes import Prefixes
    from hycluster.gateway.router import make_policy

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        raise AssertionError(request_id, error)

    made = make_policy(policy, policy, seed=1, session_slack_tokens=8192)
    gateway = PoolClient("tiny", made, policy, wait_s=30, prefixes=Prefixes(), on_lost=on_lost)
    pool.gateways = [gateway]
    await pool.report()
    await pool.known()
    await gateway.call_all("reset_prefix_cache")
    await pool.known()
    chance = random.Random(11)
    system = [chance.randrange(250) for _ in range(SYSTEM_TOKENS)]
    said = [[*system, *(chance.randrange(250) for _ in range(200))] for _ in range(CONVERSATIONS)]
    for _ in range(TURNS):
        for prompt in said:
            params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
            await pool.ask(gateway, prompt_token_ids=list(prompt), sampling_params=params)
            await pool.finish(gateway)
            await pool.known()
            prompt += [chance.randrange(250) for _ in range(TURN_TOKENS)]
    assert gateway.prefixes is not None
    assert errors(pool) == (0, 0)
    assert predictions(pool) == CONVERSATIONS * TURNS
    await gateway.close()
    pool.gateways = []
    return gateway.prefixes.audit.cached_tokens


async def test_conversations_find_what_was_computed_for_them(tiny_model: Path) -> None:
    """The default finds less, since it does not look. What each predicts is what is found."""
    async with opened(tiny_model, 2, 40 * KV_GIB, {}) as pool:
        for gateway in pool.gateways:
            await gateway.close()
        by_load, by_prefix = await hits(pool, "least_outstanding_tokens"), await hits(pool, "predicted_ttft")

        def whole(tokens: int) -> int:
            return tokens // BLOCK_TOKENS * BLOCK_TOKENS

        # The system prompt on either replica, and all that each conversation had said before.
        before = [whole(SYSTEM_TOKENS + 200 + turn * TURN_TOKENS) for turn in range(TURNS - 1)]
        all_there_is = CONVERSATIONS * sum(before) + (CONVERSATIONS - 2) * whole(SYSTEM_TOKENS)
        assert by_prefix >= 0.97 * all_there_is
        assert by_prefix > by_load


async def test_a_gateway_that_did_not_ask_is_told_nothing(tiny_model: Path) -> None:
    from hycluster.gateway.pool import PoolClient

    async def on_lost(request_id: str, error: HyclusterError) -> None:
        raise AssertionError(request_id, error)

    async with opened(tiny_model, 1, KV_GIB, {}) as pool:
        plain = PoolClient("tiny", AnyReplica(), "plain", wait_s=30, on_lost=on_lost)
        pool.gateways.append(plain)
        await pool.report()
        await pool.ask(plain, prompt_token_ids=[3] * 200, priority=int(Priority.ONLINE))
        await pool.finish(plain)
        assert plain.prefixes is None
        pool.gateways.remove(plain)
        await pool.known()
        assert len(pool.held("r0")) == 200 // BLOCK_TOKENS
        for gateway in pool.gateways:
            await gateway.close()
        pool.gateways = [plain]
        blocks = pool.running["r0"][0]._core._blocks
        await until(lambda: blocks.followers == ())
