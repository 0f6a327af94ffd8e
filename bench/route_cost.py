"""What it costs to choose a replica by what each has cached: time of a choice, hashing included, and memory.

    python -m bench.route_cost           # about 1 minute; 1.5 GiB of memory

A prompt of 32,000 tokens and blocks of 16 and of 128; pools of 8 replicas and of 1,000, each with 100,000 blocks. Every
replica holds the first 512 tokens (a system prompt). `turn`: a conversation's next turn; all but its last 1,000 tokens
are held by two replicas, and this gateway has hashed them before. `new`: nothing but the system prompt is held.
`foreign`: two replicas hold all of it, and this gateway has never seen it, so all of it has to be hashed. A choice is
what a gateway does from a request to its replica: hashing, looking up, the columns of the pool with what 8 gateways
have at each replica, the policy `predicted_ttft`, and counting on what is sent. `after` is what it does when the
request has left: naming the blocks that nobody had. CPU is the thread's own time, which does not count that others
have the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from hycluster.core import ColocationLoad, GatewayWork, ReplicaLoad
from hycluster.engine.block_changes import NAME_BYTES, Names, encode_changes
from hycluster.engine.protocol import BlockNaming, EngineInfo
from hycluster.gateway.block_names import BlockNamer
from hycluster.gateway.columns import pool_columns
from hycluster.gateway.prefixes import Prefixes
from hycluster.gateway.router import ByBlocks, RouteRequest, make_policy
from hycluster.gateway.sent_work import SentWork, work_of_others

PROMPT_TOKENS, SHARED_TOKENS, TURN_TOKENS, BLOCKS = 32_000, 512, 1_000, 100_000
# Replicas whose blocks are stored one by one.
FILLED = 8
GATEWAYS = 8
STEP = ColocationLoad(step_time_s=(0.015, 5e-5, 6e-5, 2e-9))
ROOT = os.urandom(32)


def asked(tokens: list[int]) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@dataclass
class Seen:
    """Of one replica, what a gateway knows but for KV blocks."""

    replica_id: str
    rng: random.Random
    work: SentWork = field(default_factory=SentWork)

    def __post_init__(self) -> None:
        rng = self.rng
        work = {
            f"g{number}": GatewayWork(
                rng.randrange(10_000), rng.randrange(20), rng.randrange(10), rng.randrange(90_000)
            )
            for number in range(GATEWAYS)
        }
        tokens = {gateway: each.prefill_tokens + 100 for gateway, each in work.items()}
        self.load: ReplicaLoad | None = ReplicaLoad(outstanding_tokens=tokens, work=work, colocation=STEP)
        self.others: array[float] = work_of_others(self.load, "g0")
        self.work.row[0] = rng.randrange(10_000)


class Gateway:
    """One that follows a pool whose replicas are full; the last 5,000 blocks of each are for what is asked here."""

    def __init__(self, replicas: int, block_tokens: int, rng: random.Random) -> None:
        self.naming = BlockNaming(block_tokens, "sha256", ROOT)
        self.info = EngineInfo(131_072, BLOCKS * block_tokens, block_tokens, blocks=self.naming)
        self.prefixes = Prefixes()
        policy = make_policy("predicted_ttft", "g0", 0)
        assert isinstance(policy, ByBlocks)
        self.policy = policy
        self.ids = [str(number) for number in range(replicas)]
        generator = np.random.default_rng(0)
        for replica in self.ids[FILLED:]:
            self.say(replica)
        begun = time.thread_time()
        for replica in self.ids[:FILLED]:
            self.say(replica, generator.integers(1, 1 << 63, BLOCKS - 5_000, np.uint64))
            self.say(replica, dropped=generator.integers(1, 1 << 63, 100, np.uint64))
        self.store_s = (time.thread_time() - begun) / FILLED / (BLOCKS - 5_000)
        # Storing 10**8 blocks takes minutes; for the rest, the same blocks are as good as others.
        assert self.prefixes._index is not None
        self.index = self.prefixes._index
        full = [self.index.row(replica) for replica in self.ids[:FILLED]]
        for number, replica in enumerate(self.ids[FILLED:]):
            row = self.index.row(replica)
            self.index._table[:, row] = self.index._table[:, full[number % FILLED]]
            self.index._counts[row] = BLOCKS - 5_000
        self.links = [Seen(replica, rng) for replica in self.ids]

    def say(self, replica: str, stored: Names | None = None, dropped: Names | None = None) -> None:
        """As a replica does."""
        some, gone = ([] if names is None else _pieces(names) for names in (stored, dropped))
        self.prefixes.hear(replica, self.info, encode_changes(1, some, gone))

    def serve(self, tokens: list[int]) -> tuple[float, float, float]:
        """Seconds of a choice, its CPU seconds, and those of what is done after it."""
        request = asked(tokens)
        begun, begun_cpu = time.perf_counter(), time.thread_time()
        prefix = self.prefixes.of(request)
        assert prefix is not None
        replica_ids = [link.replica_id for link in self.links]
        seen = self.prefixes.seen(prefix, replica_ids)
        assert seen is not None
        columns = pool_columns(self.links, replica_ids, *seen, step_tokens=self.policy.step_tokens, bulk=False)
        length = len(tokens)
        route = RouteRequest(tokens=length + 300, prompt_tokens=length, output_tokens=300, prefix=prefix.begin)
        self.prefixes.send(prefix, self.links[self.policy.place(columns, route)].replica_id)
        chosen, chosen_cpu = time.perf_counter(), time.thread_time()
        self.prefixes.finish(prefix, request)
        after_s = time.thread_time() - chosen_cpu
        self.prefixes.let_go(prefix)
        return chosen - begun, chosen_cpu - begun_cpu, after_s


def _pieces(names: Names) -> list[bytes]:
    packed = names.astype(">u8").tobytes()
    return [packed[begin : begin + NAME_BYTES] for begin in range(0, len(packed), NAME_BYTES)]


def prompt(rng: random.Random, shared: list[int], tokens: int = PROMPT_TOKENS) -> list[int]:
    return shared + [rng.randrange(128_000) for _ in range(tokens - len(shared))]


def measure(gateway: Gateway, rounds: int, rng: random.Random) -> None:
    naming, replicas = gateway.naming, gateway.ids
    shared = [rng.randrange(128_000) for _ in range(SHARED_TOKENS)]
    common = BlockNamer().names(asked(shared), naming)
    for replica in replicas:
        gateway.say(replica, common)
    stored = list[tuple[str, Names]]()

    def held(tokens: list[int], namer: BlockNamer) -> None:
        names = namer.names(asked(tokens), naming)
        namer.remember()
        for replica in rng.sample(replicas, min(2, len(replicas))):
            gateway.say(replica, names)
            stored.append((replica, names))

    def turn() -> list[int]:
        earlier = prompt(rng, shared, PROMPT_TOKENS - TURN_TOKENS)
        held(earlier, gateway.prefixes._namer)
        return prompt(rng, earlier)

    def new() -> list[int]:
        return prompt(rng, shared)

    def foreign() -> list[int]:
        tokens = prompt(rng, shared)
        held(tokens, BlockNamer())
        return tokens

    kinds: tuple[Callable[[], list[int]], ...] = (turn, new, foreign)
    for kind in kinds:
        took = list[tuple[float, float, float]]()
        for _ in range(rounds):
            took.append(gateway.serve(kind()))
            while stored:
                replica, names = stored.pop()
                gateway.say(replica, dropped=names[len(common) :])
        cells = "".join(
            f"{1e3 * sorted(each)[int(share * len(each))]:>10.3f}"
            for each in zip(*took, strict=True)
            for share in (0.5, 0.99)
        )
        print(f"{len(replicas):>9}{naming.tokens:>7}  {kind.__name__:<9}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 1000])
    arguments = parser.parse_args()
    heads = ("p50", "p99", "CPU p50", "CPU p99", "after p50", "after p99")
    print(f"{'replicas':>9}{'block':>7}  {'ms':<9}" + "".join(f"{head:>10}" for head in heads))
    for replicas in arguments.replicas:
        for block_tokens in (16, 128):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            gateway = Gateway(replicas, block_tokens, random.Random(1))
            measure(gateway, arguments.rounds, random.Random(1))
            index = gateway.index
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << 20)
            print(
                f"index: {index.nbytes / (1 << 30):.3f} GiB for {replicas * (BLOCKS - 5_000):,} blocks,"
                f" {1e6 * gateway.store_s:.2f} us to store one, {index.beside} beside the table;"
                f" the process grew by {grown:.2f} GiB"
            )
            del gateway, index


if __name__ == "__main__":
    main()
