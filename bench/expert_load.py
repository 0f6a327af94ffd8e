"""What random compensation does to the slowest expert parallel rank, on a skewed router.

    python -m bench.expert_load

Routes batches of random tokens through a router whose experts have unequal appeal, plain and with random
compensation at several capacity factors, and prints the load of the busiest rank over the mean (a step waits for
it), the share of tokens moved, and the softmax probability that a token's experts have between them, over plain
routing's: a measure of what it costs in quality, no more. Then what routing itself takes on this machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hycluster.engine.expert_load import by_rank, skew
from hycluster.models.recycling import expert_loads, recycle, route
from hycluster.models.routing import ExpertRouter
from hycluster.settings.model import Routing

FACTORS = (1.0, 1.25, 1.5, 2.0)
RANKS = (2, 4, 8, 16)


def skewed_logits(tokens: int, experts: int, appeal: float, generator: torch.Generator) -> Tensor:
    """[tokens, experts]: each token's own taste, standard normal, plus each expert's, normal times ``appeal``."""
    taste = torch.randn(tokens, experts, generator=generator)
    return taste + appeal * torch.randn(experts, generator=generator)


def measure(experts: int, top_k: int, factor: float | None, batches: list[Tensor]) -> list[str]:
    """One line of the table: busiest over mean by number of ranks, share moved, probability kept."""
    loads, moved, kept, plain = [], 0, 0.0, 0.0
    for layer, logits in enumerate(batches):
        _, best = route(logits, top_k)
        ids, shifted = best, torch.zeros(1)
        if factor is not None:
            _, ids, shifted = recycle(logits, top_k, factor, seed=0, layer=layer)
        probabilities = logits.softmax(-1)
        loads.append(expert_loads(ids, experts).tolist())
        moved += int(shifted.sum())
        kept += float(probabilities.gather(1, ids.long()).sum())
        plain += float(probabilities.gather(1, best.long()).sum())
    by_ranks = [f"{skew([by_rank(load, ranks) for load in loads]):.2f}" if ranks <= experts else "" for ranks in RANKS]
    total = sum(map(sum, loads))
    name = "plain" if factor is None else f"{factor:g}"
    return [str(experts), str(top_k), name, *by_ranks, f"{moved / total:.1%}", f"{kept / plain:.2f}"]


def seconds(call: Callable[[], Any], repeats: int = 200) -> float:
    """Time of the fastest call: whatever else the machine does only adds to it."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print as Markdown."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a batch")
    parser.add_argument("--batches", type=int, default=16, help="batches, each with appeals of its own, as layers have")
    parser.add_argument("--appeal", type=float, default=1.0, help="spread of the experts' appeal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows, costs = [], []
    for experts, top_k in ((8, 1), (16, 1), (64, 8)):
        generator = torch.Generator().manual_seed(options.seed)
        batches = [skewed_logits(options.tokens, experts, options.appeal, generator) for _ in range(options.batches)]
        rows += [measure(experts, top_k, factor, batches) for factor in (None, *FACTORS)]
        for tokens in (32, 256, options.tokens):
            logits = batches[0][:tokens]
            ways = (
                partial(route, logits, top_k),
                partial(ExpertRouter(experts, top_k, 0, Routing(expert_metrics=True)).choose, logits),
                partial(recycle, logits, top_k, 1.25, 0),
            )
            costs.append([str(experts), str(top_k), str(tokens), *(f"{seconds(way) * 1e6:.0f}" for way in ways)])
    ranks = [f"{ranks} ranks" for ranks in RANKS]
    table(["experts", "k", "capacity factor", *ranks, "moved", "probability kept"], rows)
    print()
    table(["experts", "k", "tokens", "plain us", "plain, counted us", "compensated us"], costs)


if __name__ == "__main__":
    main()
