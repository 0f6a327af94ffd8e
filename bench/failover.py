"""What failover costs when nothing dies: throughput with it against ``router.failover: false``, in one call.

    python -m bench.failover --turns 12

Two clusters stay up and take turns, some seconds each, and the one that begins alternates: a machine's ups and downs
hit both alike. Each pair of turns gives a ratio; what counts is the median of the ratios. The model has next to no
size, so that a token's way through the gateway, where failover keeps it, is most of its cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import tiny_llama
from bench.gateway import NO_FAILOVER, started

ON, OFF = "hycluster", NO_FAILOVER


def measure(turns: int, callers: int, requests: int, cpus: float) -> dict[str, list[dict[str, Any]]]:
    """By side, the figures of each turn."""
    figures: dict[str, list[dict[str, Any]]] = {ON: [], OFF: []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        model = tiny_llama.make(work / "model")
        loads = {name: stack.enter_context(started(name, model, work, cpus)) for name in figures}
        for turn in range(turns):
            for name in (ON, OFF) if turn % 2 else (OFF, ON):
                figures[name].append(loads[name](callers, requests))
            on, off = (figures[name][-1]["tokens_s"] for name in (ON, OFF))
            print(f"turn {turn + 1}: on {on:.0f} tokens/s, off {off:.0f}, ratio {on / off:.3f}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--requests", type=int, default=384, help="of 64 tokens each, a turn and side")
    parser.add_argument("--cpus", type=float, default=1, help="threads of each engine")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    figures = measure(args.turns, args.callers, args.requests, args.cpus)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    for field in ("tokens_s", "cpu_s_per_1k_tokens", "ttft_p50_ms"):
        on, off = ([turn[field] for turn in figures[name]] for name in (ON, OFF))
        ratios = sorted(one / other for one, other in zip(on, off, strict=True))
        print(
            f"{field}: on {statistics.median(on):.3f}, off {statistics.median(off):.3f} (medians);"
            f" ratio on / off: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        )
    print(f"failed: on {sum(t['failed'] for t in figures[ON])}, off {sum(t['failed'] for t in figures[OFF])}")


if __name__ == "__main__":
    main()
