"""What it costs to know which KV blocks replicas hold (``router.follow_kv_blocks``).

    python -m bench.kv_state

An engine's side is vLLM's scheduler and KV cache manager without a model (``VirtualEngine``): prompts of 600 tokens,
half of them shared, 200 tokens of output, with and without a follower in turn. A gateway's side: names of a prompt's
blocks, a look into an index of so many replicas that share half of their blocks, and the index's own size.
Times are CPU time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from bench import tiny_llama
from hycluster.core import Priority
from hycluster.engine.block_changes import BlockChanges
from hycluster.engine.cached_blocks import cached_blocks
from hycluster.engine.protocol import BlockNaming
from hycluster.engine.vllm import engine_config
from hycluster.gateway.block_names import BlockNamer
from hycluster.gateway.held_blocks import HeldBlocks
from hycluster.settings.model import Model
from hycluster.simulate.engine import VirtualEngine

BLOCK_TOKENS, ROWS, STEPS = 16, 32, 2000
NAMING = BlockNaming(BLOCK_TOKENS, "sha256", os.urandom(32))


def steps(folder: Path, follow: bool) -> tuple[float, list[int]]:
    """CPU seconds of a step, and bytes that its follower gets."""
    arguments = {"max_model_len": 2048, "max_num_seqs": ROWS, "block_size": BLOCK_TOKENS}
    model = Model(name="m", source=str(folder), engine=arguments)
    engine = VirtualEngine(engine_config(model, str(folder)), 4000, lambda work: 0.02)
    blocks = cached_blocks(engine.scheduler)
    assert blocks is not None
    if follow:
        blocks.follow(1)
    chance, sent, sizes = random.Random(1), 0, []
    begun = time.process_time()
    for _ in range(STEPS):
        while sum(engine.scheduler.get_request_counts()) < ROWS + 4:
            shared = [sent % 8] * 300
            engine.add(f"r{sent}", shared + [chance.randrange(250) for _ in range(300)], 200, int(Priority.ONLINE))
            sent += 1
        engine.step()
        sizes.append(len(blocks.changes() or b""))
    return (time.process_time() - begun) / STEPS, sizes


def cpu_us(call: Callable[[], object], times: int = 50) -> tuple[float, float]:
    took = []
    for _ in range(times):
        begun = time.thread_time()
        call()
        took.append(1e6 * (time.thread_time() - begun))
    return statistics.median(took), max(took)


def index_of(replicas: int, blocks: int, prompt: list[int]) -> HeldBlocks:
    """Half of each replica's blocks are on all of them, the prompt's among these."""
    chance, index = np.random.default_rng(1), HeldBlocks()
    shared = np.concatenate([np.array(prompt, np.uint64), chance.integers(0, 2**63, blocks // 2, np.uint64)])
    for number in range(replicas):
        own = chance.integers(0, 2**63, blocks - len(shared), np.uint64)
        held = BlockChanges(1, True, np.concatenate([shared, own]), np.empty(0, np.uint64))
        index.take(f"replica-{number}", held)
    return index


def request(tokens: int) -> EngineCoreRequest:
    chance = random.Random(tokens)
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[chance.randrange(100_000) for _ in range(tokens)],
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[500, 4000, 32_000])
    parser.add_argument("--replicas", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--blocks", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = tiny_llama.make(Path(work) / "model")
        turns = [(steps(folder, follow=False), steps(folder, follow=True)) for _ in range(args.turns)]
    without, followed = (1e6 * statistics.median(turn[side][0] for turn in turns) for side in (0, 1))
    sizes = turns[0][1][1]
    said = [size for size in sizes if size]
    print(f"a step: {without:.0f} us, followed {followed:.0f} us (scheduling alone, {ROWS} rows)")
    print(
        f"bytes a step: mean {statistics.mean(sizes):.0f}, largest {max(sizes)}; {len(said) / STEPS:.0%} say something"
    )
    for tokens in args.tokens:
        asked = request(tokens)
        new, _ = cpu_us(lambda: BlockNamer().names(asked, NAMING))  # noqa: B023
        namer = BlockNamer()
        known, _ = cpu_us(lambda: namer.names(asked, NAMING))  # noqa: B023
        print(f"names of {tokens} tokens: {new:.0f} us; known before, {known:.0f} us")
    names = BlockNamer().names(request(max(args.tokens)), NAMING)
    for replicas in args.replicas:
        tracemalloc.start()
        index = index_of(replicas, args.blocks, names)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        middle, most = cpu_us(lambda: index.matched(names))  # noqa: B023
        print(
            f"{replicas} replicas of {args.blocks} blocks: {size / index.blocks:.0f} bytes a block and replica"
            f" ({size / len(index._holders):.0f} a name); a look for {len(names)} blocks {middle:.0f} us,"
            f" at most {most:.0f}"
        )


if __name__ == "__main__":
    main()
