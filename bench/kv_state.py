"""What it costs to know which KV blocks replicas hold (``router.follow_kv_blocks``).

    python -m bench.kv_state

An engine's side is vLLM's scheduler and KV cache manager without a model (``VirtualEngine``): prompts of 600 tokens,
half of them shared, 200 tokens of output, with and without a follower in turn. A gateway's side: taking down what these
steps say, and names of a prompt's blocks. Times are CPU time. What a choice costs is in ``bench/route_cost.py``.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from bench import tiny_llama
from hycluster.core import Priority
from hycluster.engine.block_changes import decode_changes
from hycluster.engine.cached_blocks import cached_blocks
from hycluster.engine.protocol import BlockNaming
from hycluster.engine.vllm import engine_config
from hycluster.gateway.block_index import BlockIndex
from hycluster.gateway.block_names import BlockNamer
from hycluster.settings.model import Model
from hycluster.simulate.engine import VirtualEngine

BLOCK_TOKENS, ROWS, STEPS = 16, 32, 2000
NAMING = BlockNaming(BLOCK_TOKENS, "sha256", os.urandom(32))


def steps(folder: Path, follow: bool) -> tuple[float, list[bytes]]:
    """CPU seconds of a step, and what its follower gets."""
    arguments = {"max_model_len": 2048, "max_num_seqs": ROWS, "block_size": BLOCK_TOKENS}
    model = Model(name="m", source=str(folder), engine=arguments)
    engine = VirtualEngine(engine_config(model, str(folder)), 4000, lambda work: 0.02)
    blocks = cached_blocks(engine.scheduler)
    assert blocks is not None
    if follow:
        blocks.follow(1)
    chance, sent, said = random.Random(1), 0, list[bytes]()
    begun = time.process_time()
    for _ in range(STEPS):
        while sum(engine.scheduler.get_request_counts()) < ROWS + 4:
            shared = [sent % 8] * 300
            engine.add(f"r{sent}", shared + [chance.randrange(250) for _ in range(300)], 200, int(Priority.ONLINE))
            sent += 1
        engine.step()
        said.append(blocks.changes() or b"")
    return (time.process_time() - begun) / STEPS, said


def cpu_us(call: Callable[[], object], times: int = 50) -> tuple[float, float]:
    took = []
    for _ in range(times):
        begun = time.thread_time()
        call()
        took.append(1e6 * (time.thread_time() - begun))
    return statistics.median(took), max(took)


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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = tiny_llama.make(Path(work) / "model")
        turns = [(steps(folder, follow=False), steps(folder, follow=True)) for _ in range(args.turns)]
    without, followed = (1e6 * statistics.median(turn[side][0] for turn in turns) for side in (0, 1))
    frames = turns[0][1][1]
    sizes, said = [len(frame) for frame in frames], [frame for frame in frames if frame]
    print(f"a step: {without:.0f} us, followed {followed:.0f} us (scheduling alone, {ROWS} rows)")
    print(
        f"bytes a step: mean {statistics.mean(sizes):.0f}, largest {max(sizes)}; {len(said) / STEPS:.0%} say something"
    )
    index, coming = BlockIndex(4000), iter(said)
    middle, _ = cpu_us(lambda: index.take("r", decode_changes(next(coming))), len(said))
    print(f"taking down what a step says: {middle:.0f} us; {index.blocks} blocks at the end")
    for tokens in args.tokens:
        asked = request(tokens)
        new, _ = cpu_us(lambda: BlockNamer().names(asked, NAMING))  # noqa: B023
        namer = BlockNamer()
        known, _ = cpu_us(lambda: namer.names(asked, NAMING))  # noqa: B023
        print(f"names of {tokens} tokens: {new:.0f} us; known before, {known:.0f} us")


if __name__ == "__main__":
    main()
