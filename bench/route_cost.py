"""What it costs to choose a replica by what each has cached: time of a choice, hashing included, and memory.

    python -m bench.route_cost           # about 1 minute; 1.5 GiB of memory

A prompt of 32,000 tokens and blocks of 16 and of 128; pools of 8 replicas and of 1,000, each with 100,000 blocks. Every
replica holds the first 512 tokens (a system prompt). `turn`: a conversation's next turn; all but its last 1,000 tokens
are held by two replicas, and this gateway has hashed them before. `new`: nothing but the system prompt is held.
`foreign`: all of it is held, and this gateway has never seen it, so all of it has to be hashed. A choice is hashing,
looking up, and the policy `predicted_ttft`, with what 8 gateways have at each replica. CPU is the thread's own time,
which does not count that others have the machine.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hycluster.core import ColocationLoad, GatewayWork, ReplicaLoad
from hycluster.engine.block_changes import BlockChanges, Names
from hycluster.gateway.block_hashes import BlockHasher
from hycluster.gateway.block_index import BlockIndex
from hycluster.gateway.router import Candidate, RouteRequest, make_policy

PROMPT_TOKENS, SHARED_TOKENS, TURN_TOKENS, BLOCKS = 32_000, 512, 1_000, 100_000
# Replicas whose blocks are stored one by one.
FILLED = 8
GATEWAYS = 8
NONE = np.empty(0, np.uint64)
STEP = ColocationLoad(step_time_s=(0.015, 5e-5, 6e-5, 2e-9))


def vllm_hash(given: object) -> bytes:
    """As vLLM's ``sha256``, without the seconds that its import takes."""
    import hashlib
    import pickle

    return hashlib.sha256(pickle.dumps(given, protocol=pickle.HIGHEST_PROTOCOL)).digest()


def prompt(rng: random.Random, shared: list[int], tokens: int = PROMPT_TOKENS) -> list[int]:
    return shared + [rng.randrange(128_000) for _ in range(tokens - len(shared))]


def changes(stored: Names, dropped: Names = NONE) -> BlockChanges:
    return BlockChanges(1, False, stored, dropped)


def filled(replicas: int, generator: np.random.Generator) -> tuple[BlockIndex, float]:
    """With the seconds that it took to store a block."""
    index, stored = BlockIndex(BLOCKS), 0
    begun = time.thread_time()
    for replica in range(min(replicas, FILLED)):
        # Room for what the prompts below put there.
        index.take(str(replica), changes(generator.integers(1, 1 << 63, BLOCKS - 5_000, np.uint64)))
        stored += BLOCKS - 5_000
    took_s = (time.thread_time() - begun) / stored
    # Storing 10**8 blocks takes minutes; for the rest, the same blocks are as good as others.
    for number in range(FILLED, replicas):
        index.take(str(number), changes(NONE))
    rows = list(index._rows.values())
    for number in range(FILLED, replicas):
        index._table[rows[number]] = index._table[rows[number % FILLED]]
    return index, took_s


def seen(replica_id: str, rng: random.Random) -> Candidate:
    """Of one replica, what a gateway knows but for KV blocks."""
    work = {
        f"g{number}": GatewayWork(rng.randrange(10_000), rng.randrange(20), rng.randrange(10), rng.randrange(90_000))
        for number in range(GATEWAYS)
    }
    tokens = {gateway: each.prefill_tokens + 100 for gateway, each in work.items()}
    load = ReplicaLoad(outstanding_tokens=tokens, work=work, colocation=STEP)
    return Candidate(replica_id=replica_id, own_work=work["g0"], load=load, evicts_age_s=100 * rng.random())


def measure(index: BlockIndex, block_tokens: int, rounds: int, rng: random.Random) -> None:
    replicas = index.replica_ids
    shared = [rng.randrange(128_000) for _ in range(SHARED_TOKENS)]
    hasher = BlockHasher(vllm_hash, bytes(32), block_tokens)
    policy = make_policy("predicted_ttft", "g0", 0)
    pool = [seen(replica, rng) for replica in replicas]
    for replica in replicas:
        index.take(replica, changes(hasher.names(shared)))

    def choose(tokens: list[int], hasher: BlockHasher) -> None:
        cached = (index.cached_blocks(hasher.names(tokens)) * block_tokens).tolist()
        candidates = [replace(one, cached_tokens=count) for one, count in zip(pool, cached, strict=True)]
        policy.choose(candidates, RouteRequest(tokens=len(tokens) + 300, prompt_tokens=len(tokens), output_tokens=300))

    def turn() -> Callable[[], None]:
        earlier = prompt(rng, shared, PROMPT_TOKENS - TURN_TOKENS)
        names = hasher.names(earlier)
        for replica in rng.sample(replicas, min(2, len(replicas))):
            index.take(replica, changes(names))
            stored.append((replica, names))
        tokens = prompt(rng, earlier)
        return lambda: choose(tokens, hasher)

    def new() -> Callable[[], None]:
        tokens = prompt(rng, shared)
        return lambda: choose(tokens, hasher)

    def foreign() -> Callable[[], None]:
        tokens = prompt(rng, shared)
        names = BlockHasher(vllm_hash, bytes(32), block_tokens).names(tokens)
        replica = rng.choice(replicas)
        index.take(replica, changes(names))
        stored.append((replica, names))
        return lambda: choose(tokens, hasher)

    for kind in (turn, new, foreign):
        took, stored = list[tuple[float, float]](), list[tuple[str, Names]]()
        for _ in range(rounds):
            ready = kind()
            begun, begun_cpu = time.perf_counter(), time.thread_time()
            ready()
            took.append((time.perf_counter() - begun, time.thread_time() - begun_cpu))
            while stored:
                replica, names = stored.pop()
                index.take(replica, changes(NONE, names[SHARED_TOKENS // block_tokens :]))
        cells = "".join(
            f"{1e3 * sorted(each)[int(share * len(each))]:>10.3f}"
            for each in zip(*took, strict=True)
            for share in (0.5, 0.99)
        )
        print(f"{len(replicas):>9}{block_tokens:>7}  {kind.__name__:<9}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 1000])
    arguments = parser.parse_args()
    print(f"{'replicas':>9}{'block':>7}  {'ms':<9}{'p50':>10}{'p99':>10}{'CPU p50':>10}{'CPU p99':>10}")
    for replicas in arguments.replicas:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index, took_s = filled(replicas, np.random.default_rng(0))
        for block_tokens in (16, 128):
            measure(index, block_tokens, arguments.rounds, random.Random(1))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 << 20)
        blocks = replicas * (BLOCKS - 5_000)
        print(
            f"index: {index.nbytes / (1 << 30):.3f} GiB for {blocks:,} blocks, {1e6 * took_s:.2f} us to store one,"
            f" {index.beside} beside the table; the process grew by {grown:.2f} GiB"
        )


if __name__ == "__main__":
    main()
