"""What a router predicts of prompts in KV caches beside what engines find, while all that can happen happens.

    python -m bench.audit                        # one request after the other; about 10 minutes on two cores
    python -m bench.audit --callers 12           # beside each other

Engines of a tiny Llama, each in a process of its own, and two gateways in this one, which choose by `predicted_ttft`.
Conversations over a few system prompts, each turn by either gateway, with and without adapters and salts; caches are
small, so blocks are evicted all the time. Meanwhile replicas are killed (SIGKILL, with requests on them) and replaced,
prefix caches are reset, the pool sleeps and wakes, adapters are loaded, unloaded and moved to other weights, and with
more callers than one requests are given up.

One after the other, both gateways have heard all that was told before the next request: each prediction has to be what
is found, to the token. Beside each other, an engine may evict or store blocks between a gateway's choice and the step
that admits the request. So for each difference the first block that is wrong is looked for in what the replica told in
between, in order, and the cause is one of

- evicted, reset: a block that was predicted was told as dropped, or the whole cache was told anew;
- not stored: a block that another request was going to store, which was given up or overtaken;
- stored: all blocks that were found beyond the predicted ones were told as stored;
- not told: none of these; the exit code is 1. A block that is evicted and stored again in one step is not told either,
  as a step's net difference is, so it isn't known yet whether what is left here is more than that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from bench import tiny_llama
from bench.audited_gateways import NOT_TOLD, Ingress
from bench.prefix_policies import KV_TOKEN_BYTES, Replica
from hycluster.adapters import adapter_id
from hycluster.directory.directory import REPORT_EVERY_S, Directory
from hycluster.settings.model import Adapter, Model
from hycluster.settings.pool import Hardware
from tests.lora_adapters import attention_of, write_adapter

CONTEXT_TOKENS, BLOCK_TOKENS, SYSTEM_TOKENS, SYSTEMS, CONVERSATIONS = 1024, 32, 120, 4, 24
# Every so many requests.
KILL_EVERY, RESET_EVERY, SLEEP_EVERY, ADAPTER_EVERY = 1500, 130, 700, 170


class Pool:
    """Replicas, the directory, gateways, and what happens to them."""

    def __init__(self, model: Model, adapters: list[Path], arguments: argparse.Namespace) -> None:
        self.model, self.adapters, self.arguments = model, adapters, arguments
        self.running: dict[str, Replica] = {}
        self.happened: Counter[str] = Counter()
        self.ingresses = [Ingress(number, model) for number in range(2)]
        self.chance = random.Random(arguments.seed)
        self.loras: list[LoRARequest] = []
        self.sent, self._started, self._directory = 0, 0, Directory()
        self._tasks: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        replica = Replica(self._started, self.model)
        name, self._started = f"r{self._started}", self._started + 1
        await asyncio.to_thread(replica.wait)
        self.running[name] = replica

    async def open(self) -> None:
        await asyncio.gather(*(self.start() for _ in range(self.arguments.replicas)))
        self._tasks = [asyncio.create_task(ingress.read()) for ingress in self.ingresses]
        self._tasks.append(asyncio.create_task(self._tell()))
        while any(ingress.client.links < len(self.running) for ingress in self.ingresses):  # noqa: ASYNC110 - they tell nobody
            await asyncio.sleep(0.05)

    async def _tell(self) -> None:
        """The directory's part, for ever."""
        while True:
            for replica in list(self.running.values()):
                # One that was killed meanwhile.
                with contextlib.suppress(OSError, EOFError):
                    self._directory.report(self.model, await asyncio.to_thread(replica.report))
            for ingress in self.ingresses:
                client = ingress.client
                view = self._directory.sync(self.model.name, client.gateway_id, client.outstanding, work=client.work)
                await client.update(view.replicas)
            await asyncio.sleep(REPORT_EVERY_S)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for ingress in self.ingresses:
            await ingress.client.close()
        for replica in self.running.values():
            await asyncio.to_thread(replica.close)

    # -- what happens -------------------------------------------------------------------------------

    async def kill(self, name: str) -> None:
        """SIGKILL, and another one in its place, which takes its time."""
        replica = self.running.pop(name)
        os.kill(replica.pid, signal.SIGKILL)
        self.happened["kills"] += 1
        self._tasks.append(asyncio.create_task(self.start()))
        self.happened["restarts"] += 1

    async def rest(self) -> None:
        """While no request is there."""
        ingress = self.chance.choice(self.ingresses)
        await ingress.do("sleep", 1)
        await ingress.do("wake_up")
        self.happened["sleeps"] += 1

    async def between(self, number: int) -> None:
        """What is due before this request."""
        ingress = self.chance.choice(self.ingresses)
        if number % RESET_EVERY == 0:
            # An engine that has requests refuses.
            self.happened["resets"] += sum(await ingress.do("reset_prefix_cache"))
        if number % ADAPTER_EVERY == 0:
            if len(self.loras) == 2:
                await ingress.do("remove_lora", self.loras.pop(0).lora_int_id)
                self.happened["adapters unloaded"] += 1
            # A name of before, and other weights.
            name, path = "ab"[self.happened["adapters loaded"] % 2], str(self.chance.choice(self.adapters))
            lora = LoRARequest(name, adapter_id(name, path), path)
            await ingress.do("add_lora", lora)
            self.loras.append(lora)
            self.happened["adapters loaded"] += 1

    # -- requests -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Until enough is compared."""
        conversations = [Conversation(number, self) for number in range(CONVERSATIONS)]
        callers = self.arguments.callers
        while self.compared < self.arguments.requests:
            round_ends = self.sent + SLEEP_EVERY
            await asyncio.gather(*(self._call(conversations[each::callers], round_ends) for each in range(callers)))
            await self.rest()
            print(f"{self.sent:>7} requests, {self.compared:>7} compared, {self.exact:>7} exact", flush=True)

    async def _call(self, conversations: list[Conversation], round_ends: int) -> None:
        while self.sent < round_ends:
            self.sent += 1
            number = self.sent
            await self.between(number)
            if self.arguments.callers == 1:
                await asyncio.gather(*(ingress.do("get_supported_tasks") for ingress in self.ingresses))
            await self.chance.choice(conversations).turn(number)

    def total(self, name: str) -> int:
        return sum(getattr(ingress.audited, name) for ingress in self.ingresses)

    @property
    def compared(self) -> int:
        return self.total("compared")

    @property
    def exact(self) -> int:
        return self.total("exact")


class Conversation:
    """Begins anew when it is as long as prompts can be."""

    def __init__(self, number: int, pool: Pool) -> None:
        self._pool = pool
        system = random.Random(number % SYSTEMS)
        self._begin = [system.randrange(2, 250) for _ in range(SYSTEM_TOKENS)]
        self._said = list(self._begin)
        self._salt: str | None = None
        self._lora: LoRARequest | None = None

    async def turn(self, number: int) -> None:
        pool, chance = self._pool, self._pool.chance
        if len(self._said) > CONTEXT_TOKENS - 120 or chance.random() < 0.04:
            self._said = list(self._begin)
            self._salt = chance.choice([None, None, "x", "y"])
            self._lora = chance.choice([None, *pool.loras])
        self._said += [chance.randrange(2, 250) for _ in range(chance.randrange(1, 70))]
        ingress = chance.choice(pool.ingresses)
        params = SamplingParams(
            max_tokens=chance.randrange(1, 24), temperature=0, ignore_eos=True,
            prompt_logprobs=0 if chance.random() < 0.02 else None,
        )  # fmt: skip
        request = EngineCoreRequest(
            request_id=f"q{number}", prompt_token_ids=list(self._said), mm_features=None, sampling_params=params,
            pooling_params=None, arrival_time=time.time(), lora_request=self._lora, cache_salt=self._salt,
            data_parallel_rank=None,
        )  # fmt: skip
        async with ingress.asked(request) as answers:
            # Half of those that die have begun.
            kills, begun = number % KILL_EVERY == 0, number // KILL_EVERY % 2
            if kills and not begun:
                await pool.kill(ingress.place(request))
            if pool.arguments.callers > 1 and chance.random() < 0.02:
                await asyncio.sleep(0.02 * chance.random())
                pool.happened["given up"] += 1
                await ingress.client.abort_requests_async([request.request_id])
                return
            while True:
                output = await answers.get()
                self._said += output.new_token_ids
                if output.finish_reason is not None:
                    break
                if kills and begun:
                    kills = False
                    await pool.kill(ingress.place(request))


async def audit(arguments: argparse.Namespace, folder: Path) -> int:
    source = str(tiny_llama.make(folder / "model", context_tokens=CONTEXT_TOKENS))
    shapes = attention_of(2, 64)
    adapters = [write_adapter(folder / f"adapter{seed}", shapes, seed=seed) for seed in range(4)]
    hardware = Hardware(kv_cache_gib=arguments.kv_tokens * KV_TOKEN_BYTES / 2**30)
    engine = {
        "max_model_len": CONTEXT_TOKENS, "max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_loras": 2,
        "block_size": BLOCK_TOKENS,
    }  # fmt: skip
    model = Model(
        name="tiny", source=source, engine=engine, hardware=hardware,
        adapters=tuple(Adapter(name=name, source=str(path)) for name, path in zip("cd", adapters, strict=False)),
    )  # fmt: skip
    pool = Pool(model, adapters, arguments)
    begun = time.monotonic()
    try:
        await pool.open()
        await pool.serve()
    finally:
        await pool.close()
    happened = ", ".join(f"{count} {what}" for what, count in sorted(pool.happened.items()))
    found = sum(ingress.audited.audit.cached_tokens for ingress in pool.ingresses)
    print(f"\n{pool.sent} requests in {time.monotonic() - begun:.0f} s; {happened}")
    print(f"{pool.compared} compared, of which {pool.exact} exact; {found:,} tokens found cached")
    causes = sum((ingress.audited.causes for ingress in pool.ingresses), Counter[str]())
    tokens = sum((ingress.audited.tokens for ingress in pool.ingresses), Counter[str]())
    for cause, count in causes.most_common():
        print(f"{cause:<12}{count:>7} requests, {tokens[cause]:>8} tokens")
    wrong = pool.compared - pool.exact if arguments.callers == 1 else causes[NOT_TOLD]
    print(f"{wrong} errors")
    return int(wrong > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--kv-tokens", type=int, default=6_000, help="Of a replica.")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    # For the engines' processes.
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(asyncio.run(audit(arguments, Path(folder))))


if __name__ == "__main__":
    main()
