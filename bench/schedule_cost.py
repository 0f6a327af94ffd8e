"""What the colocation scheduler costs a step without batch requests, beside vLLM's own scheduler.

    python -m bench.schedule_cost

vLLM's scheduler and KV cache manager without a model (``VirtualEngine``), so all that is timed is scheduling: who is in
a step, their blocks, and what comes of it. Both take turns, a hundred steps each; medians of the turns are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from bench import tiny_llama
from hycluster.core import Priority
from hycluster.engine.vllm import engine_config
from hycluster.settings.model import Colocation, Model
from hycluster.simulate.engine import VirtualEngine

STEPS = 100


def engine(folder: Path, enabled: bool, requests: int) -> VirtualEngine:
    model = Model(
        name="m",
        source=str(folder),
        engine={"max_model_len": 2048, "max_num_seqs": 128},
        colocation=Colocation(enabled=enabled),
    )
    found = VirtualEngine(engine_config(model, str(folder)), 20_000, lambda work: 0.02 + 1e-5 * work.sequences)
    for number in range(requests):
        found.add(f"r{number}", [3 + (number * 7919 + i * 31) % 250 for i in range(40)], 2000, Priority.ONLINE)
    for _ in range(STEPS):
        found.step()
    return found


def step_s(found: VirtualEngine) -> float:
    begun = time.process_time()
    for _ in range(STEPS):
        found.step()
    return (time.process_time() - begun) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 32, 64])
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    print(f"{'requests':>9}{'vLLM us':>10}{'ours us':>10}{'more us':>10}{'of 20 ms':>10}")
    with tempfile.TemporaryDirectory() as work:
        folder = tiny_llama.make(Path(work) / "model")
        for requests in args.requests:
            sides = {enabled: engine(folder, enabled, requests) for enabled in (False, True)}
            turns = [{enabled: step_s(side) for enabled, side in sides.items()} for _ in range(args.turns)]
            theirs, ours = (statistics.median(turn[enabled] for turn in turns) for enabled in (False, True))
            more = ours - theirs
            print(f"{requests:>9}{1e6 * theirs:>10.0f}{1e6 * ours:>10.0f}{1e6 * more:>10.0f}{more / 0.02:>10.2%}")


if __name__ == "__main__":
    main()
