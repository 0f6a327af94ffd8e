"""What the colocation scheduler costs a step without batch requests, beside vLLM's own scheduler: of nobody's requests,
of one tenant's, and of two tenants'.

    python -m bench.schedule_cost

vLLM's scheduler and KV cache manager without a model (``VirtualEngine``), so all that is timed is scheduling: who is in
a step, their blocks, and what comes of it. All take turns, a hundred steps each; medians of the turns are printed.
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


# By side: whether it is ours, and how many tenants there are.
SIDES = {"vLLM": (False, 0), "ours": (True, 0), "one tenant": (True, 1), "two": (True, 2)}


def engine(folder: Path, side: str, requests: int) -> VirtualEngine:
    enabled, tenants = SIDES[side]
    model = Model(
        name="m",
        source=str(folder),
        engine={"max_model_len": 2048, "max_num_seqs": 128},
        colocation=Colocation(enabled=enabled),
    )
    found = VirtualEngine(engine_config(model, str(folder)), 20_000, lambda work: 0.02 + 1e-5 * work.sequences)
    for number in range(requests):
        prompt = [3 + (number * 7919 + i * 31) % 250 for i in range(40)]
        payer = (f"tenant {number % tenants}", 1.0) if tenants else None
        found.add(f"r{number}", prompt, 2000, Priority.ONLINE, payer=payer)
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
    others = [side for side in SIDES if side != "vLLM"]
    print(f"{'requests':>9}{'vLLM us':>10}" + "".join(f"{side + ', more us':>22}" for side in others))
    with tempfile.TemporaryDirectory() as work:
        folder = tiny_llama.make(Path(work) / "model")
        for requests in args.requests:
            sides = {side: engine(folder, side, requests) for side in SIDES}
            turns = [{side: 1e6 * step_s(engine) for side, engine in sides.items()} for _ in range(args.turns)]
            theirs = statistics.median(turn["vLLM"] for turn in turns)
            more = [statistics.median(turn[side] - turn["vLLM"] for turn in turns) for side in others]
            print(f"{requests:>9}{theirs:>10.0f}" + "".join(f"{us:>22.0f}" for us in more), flush=True)


if __name__ == "__main__":
    main()
