"""Policies of the router on real engines: what conversations find cached, and their first tokens.

    python -m bench.prefix_policies                 # about 3 minutes on two cores
    python -m bench.prefix_policies --rounds 3 --policies least_outstanding_tokens predicted_ttft

Engines of a tiny Llama, each in a process of its own, and two gateways in this one; they hear of each other twice a
second by a directory, as ingress processes do. Conversations of many turns, over a few system prompts, each
turn by either gateway: a prompt is all that was said before, answers too. Each policy in turn gets the same
conversations, from empty caches. `by session`: the same policy, and callers that name their sessions.

TTFT is that of engines that share two cores with all else, so only its order says something. Hits are exact: tokens of
prompts that engines found cached, of all tokens of prompts. `missing`, `unforeseen`: what was predicted and not found,
and the reverse, of all tokens of prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from bench import tiny_llama
from hycluster.directory.directory import REPORT_EVERY_S, Directory, ReplicaReport
from hycluster.engine.vllm import VllmEngine
from hycluster.errors import HyclusterError
from hycluster.gateway.pool import PoolClient
from hycluster.gateway.prefixes import Prefixes
from hycluster.gateway.router import POLICIES, make_policy
from hycluster.replica.wire import EngineServer
from hycluster.settings.load import DataPlane
from hycluster.settings.model import Model
from hycluster.settings.pool import Hardware

BY_SESSION = " by session"
SIDES = ("least_outstanding_tokens", "least_outstanding_tokens" + BY_SESSION, *POLICIES[1:])
CONTEXT_TOKENS, SYSTEM_TOKENS, SYSTEMS, OUTPUT_TOKENS = 4096, 400, 4, 24
# A token of the model in the KV cache.
KV_TOKEN_BYTES = 1024


class Replica:
    """An engine and its sockets, in a process of their own: two that compute at once in one process end it."""

    def __init__(self, number: int, model: Model) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(number, model, theirs), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self) -> None:
        self._address = self._pipe.recv()

    def report(self) -> ReplicaReport:
        self._pipe.send(True)
        return ReplicaReport(self._address, self._pipe.recv(), True)

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(False)
        self._process.join()


def _serve(number: int, model: Model, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    engine = VllmEngine(model, model.source)
    server = EngineServer(
        engine, replica_id=f"r{number}", model=model.name, host="127.0.0.1", ports=DataPlane(host="127.0.0.1")
    )
    pipe.send(server.address)
    while pipe.recv():
        pipe.send(engine.load())
    engine.shutdown()
    server.close()


Running = list[Replica]


@dataclass
class Found:
    """Of one policy in one round."""

    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    took_s: float = 0.0
    audit: list[Any] = field(default_factory=list)
    routed: dict[str, int] = field(default_factory=dict)

    def total(self, name: str) -> float:
        return float(sum(getattr(audit, name) for audit in self.audit)) / self.prompt_tokens


class Asker:
    """One gateway, and who waits for its answers."""

    def __init__(self, client: PoolClient) -> None:
        self.client = client
        self._waiting: dict[str, asyncio.Queue[Any]] = {}

    async def read(self) -> None:
        while True:
            for output in (await self.client.get_output_async()).outputs:
                self._waiting[output.request_id].put_nowait(output)

    async def ask(self, name: str, prompt: list[int], session: str | None) -> tuple[float, list[int]]:
        """Seconds to the first token, and the answer."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        self._waiting[name] = answers
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
        asked = EngineCoreRequest(
            request_id=name, prompt_token_ids=prompt, mm_features=None, sampling_params=params, pooling_params=None,
            arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None, session_id=session,
        )  # fmt: skip
        begun, first_s, said = time.perf_counter(), 0.0, list[int]()
        await self.client.add_request_async(asked)
        while True:
            output = await answers.get()
            first_s = first_s or time.perf_counter() - begun
            said += output.new_token_ids
            if output.finish_reason is not None:
                return first_s, said


async def converse(askers: list[Asker], number: int, turns: int, by_session: bool, found: Found) -> None:
    chance = random.Random(number)
    system = random.Random(-1 - number % SYSTEMS)
    said = [system.randrange(2, 250) for _ in range(SYSTEM_TOKENS)]
    await asyncio.sleep(2 * chance.random())
    for turn in range(turns):
        said += [chance.randrange(2, 250) for _ in range(chance.randrange(60, 240))]
        asker = chance.choice(askers)
        first_s, answer = await asker.ask(f"{number}-{turn}", list(said), f"s{number}" if by_session else None)
        found.ttft_s.append(first_s)
        found.prompt_tokens += len(said)
        said += answer
        await asyncio.sleep(chance.expovariate(2))


async def tell(running: Running, model: Model, clients: list[PoolClient]) -> None:
    """The directory's part, for ever."""
    directory = Directory()
    while True:
        for replica in running:
            directory.report(model, await asyncio.to_thread(replica.report))
        for client in clients:
            view = directory.sync(model.name, client.gateway_id, client.outstanding, work=client.work)
            await client.update(view.replicas)
        await asyncio.sleep(REPORT_EVERY_S)


@contextlib.asynccontextmanager
async def gateways(running: Running, model: Model, policy: str) -> AsyncIterator[list[Asker]]:
    async def on_lost(request_id: str, error: HyclusterError) -> None:
        raise SystemExit(f"{request_id}: {error}")

    clients = [
        PoolClient(
            model.name, make_policy(policy, f"g{number}", number, session_slack_tokens=8192), f"g{number}",
            wait_s=30, prefixes=Prefixes(), on_lost=on_lost, expected_output_tokens=OUTPUT_TOKENS,
        )
        for number in range(2)
    ]  # fmt: skip
    askers = [Asker(client) for client in clients]
    tasks = [asyncio.create_task(tell(running, model, clients))]
    try:
        for client in clients:
            while client.links < len(running) and not tasks[0].done():  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.05)
        await clients[0].call_all("reset_prefix_cache")
        await asyncio.sleep(2 * REPORT_EVERY_S)
        tasks += [asyncio.create_task(asker.read()) for asker in askers]
        yield askers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.close()


async def serve(running: Running, model: Model, side: str, conversations: int, turns: int) -> Found:
    found, policy = Found(), side.removesuffix(BY_SESSION)
    async with gateways(running, model, policy) as askers:
        begun = time.perf_counter()
        await asyncio.gather(
            *(converse(askers, number, turns, side != policy, found) for number in range(conversations))
        )
        found.took_s = time.perf_counter() - begun
        found.audit = [asker.client.prefixes.audit for asker in askers if asker.client.prefixes is not None]
        for asker in askers:
            for known in asker.client.known:
                found.routed[known.replica_id] = found.routed.get(known.replica_id, 0) + known.routed
    return found


def row(side: str, rounds: list[Found]) -> str:
    def median(*figures: float) -> float:
        return statistics.median(figures)

    hits = [each.total("cached_tokens") for each in rounds]
    ttft_ms = [1e3 * second for each in rounds for second in each.ttft_s]
    busiest = [max(each.routed.values()) / statistics.mean(each.routed.values()) for each in rounds]
    missing, unforeseen = (
        median(*(each.total(name) for each in rounds)) for name in ("missing_tokens", "unforeseen_tokens")
    )
    return (
        f"{side:<37}{median(*hits):>7.3f} ({min(hits):.3f}-{max(hits):.3f}){median(*ttft_ms):>9.1f}"
        f"{statistics.mean(ttft_ms):>9.1f}{sorted(ttft_ms)[int(0.99 * len(ttft_ms))]:>9.1f}{median(*busiest):>9.2f}"
        f"{missing:>10.4f}{unforeseen:>11.4f}{median(*(each.took_s for each in rounds)):>7.1f}"
    )


async def measure(arguments: argparse.Namespace, source: str) -> None:
    hardware = Hardware(kv_cache_gib=arguments.kv_tokens * KV_TOKEN_BYTES / 2**30)
    engine = {"max_model_len": CONTEXT_TOKENS, "max_num_seqs": 16, "max_num_batched_tokens": 1024, "block_size": 32}
    model = Model(name="tiny", source=source, engine=engine, hardware=hardware)
    running = [Replica(number, model) for number in range(arguments.replicas)]
    try:
        for replica in running:
            replica.wait()
        rounds: dict[str, list[Found]] = {side: [] for side in arguments.policies}
        # What a first request compiles is nobody's.
        await serve(running, model, "power_of_two", arguments.replicas, 2)
        for _ in range(arguments.rounds):
            for side in arguments.policies:
                rounds[side].append(await serve(running, model, side, arguments.conversations, arguments.turns))
                print(row(side, rounds[side][-1:]), flush=True)
        print(f"\n{'':<37}{'hits':>7}{'':<14}{'TTFT p50':>9}{'mean':>9}{'p99, ms':>9}{'busiest':>9}"
              f"{'missing':>10}{'unforeseen':>11}{'s':>7}")  # fmt: skip
        for side, found in rounds.items():
            print(row(side, found))
    finally:
        for replica in running:
            replica.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--kv-tokens", type=int, default=16_000, help="Of a replica.")
    parser.add_argument("--policies", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = parser.parse_args()
    # For the engines' processes.
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as work:
        source = tiny_llama.make(Path(work) / "model", context_tokens=CONTEXT_TOKENS)
        asyncio.run(measure(arguments, str(source)))


if __name__ == "__main__":
    main()
