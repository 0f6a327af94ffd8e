"""Every policy of the router on real traces, in virtual time: hits, TTFT, and how even the load is.

    python -m bench.routing --trace conversations.jsonl.gz           # 8 replicas; with 64 and 8 times the load: --wide
    python -m bench.routing --trace conversations.jsonl.gz --fidelity exact --seconds 300
    python -m bench.routing                                          # a made trace

A replica computes about 20,000 tokens of prompts a second and holds 3,000 blocks of 512 tokens; a pool of 64 gets 8
times the trace, of other users. Hits are also in parts of what one LRU cache as large as all together has. The last
lines say what of the aim holds: hits of at least 0.95 of that, the lowest mean and p99 of TTFT, p99 of the load at most
1.3 times its mean.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hycluster.gateway.router import POLICIES
from hycluster.settings.model import Colocation, Model
from hycluster.settings.simulated import Simulated
from hycluster.simulate.fast import serve_fast
from hycluster.simulate.machine import Machine, simulated_machine
from hycluster.simulate.traces import HASH_TOKENS, TraceRequest, read_trace, scaled, within

OURS, BLOCKS, BLOCK_TOKENS = "predicted_ttft", 3000, 16
HITS, LOAD = 0.95, 1.3
REPLICA = Simulated(
    step_base_s=0.015, prefill_token_s=4.5e-5, decode_token_s=6e-5, kv_token_s=2e-9, max_num_seqs=256,
    max_num_batched_tokens=2048, kv_blocks=BLOCKS * HASH_TOKENS // BLOCK_TOKENS, max_model_len=131_072,
)  # fmt: skip


def made_chats(sessions: int, seconds: float, seed: int) -> list[TraceRequest]:
    """Conversations that grow turn by turn, over a few system prompts."""
    rng, found, name = random.Random(seed), list[TraceRequest](), 1000
    for _ in range(sessions):
        at_s, ids = rng.random() * seconds, [rng.randrange(4)]
        for _ in range(1 + int(rng.expovariate(0.4))):
            grown = 1 + min(40, int(rng.expovariate(0.1)))
            ids = [*ids, *range(name, name + grown)]
            name += grown
            tokens = (len(ids) - 1) * HASH_TOKENS + rng.randrange(1, HASH_TOKENS)
            found.append(TraceRequest(at_s, tokens, 1 + int(rng.expovariate(1 / 300)), tuple(ids)))
            at_s += 5 + rng.expovariate(1 / 60)
    return sorted((each for each in found if each.at_s < seconds), key=lambda each: each.at_s)


def serve(
    machine: Machine, trace: Sequence[TraceRequest], replicas: int, policy: str, seed: int, fidelity: str
) -> dict[str, Any]:
    if fidelity == "fast":
        return serve_fast(machine, trace, replicas=replicas, policy=policy, seed=seed)[1]
    from hycluster.simulate.run import Simulation

    return Simulation(machine, Colocation(enabled=False), replicas, policy, seed).serve(trace, None)[1]


def share(found: Mapping[str, Any]) -> float:
    bound = found["bounds"]["pooled_lru_hit_tokens"]
    return float(found["prefix_hit_tokens"] / bound) if bound else 0.0


def row(policy: str, found: Mapping[str, Any], took_s: float) -> str:
    ttft, tokens = found["ttft_s"], found["prompt_tokens"]
    return (
        f"{policy:<26}{found['prefix_hit_tokens'] / tokens:>7.3f}{share(found):>8.3f}{ttft['mean']:>9.3f}"
        f"{ttft['p50']:>9.3f}{ttft['p99']:>9.3f}{1e3 * found['tpot_s']['mean']:>9.1f}"
        f"{found['load_p99_over_mean']:>7.2f}{found['decision_us']['p50']:>8.0f}{took_s:>7.0f}"
    )


def verdict(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of the aim holds."""
    ours = found[OURS]
    said = [
        (f"hits {share(ours):.3f} of one LRU's, at least {HITS}", share(ours) >= HITS or not share(ours)),
        (f"load p99 {ours['load_p99_over_mean']:.2f} x mean, at most {LOAD}", ours["load_p99_over_mean"] <= LOAD),
    ]
    for kind in ("mean", "p99"):
        name, best = min(
            ((name, each["ttft_s"][kind]) for name, each in found.items() if name != OURS), key=lambda pair: pair[1]
        )
        value = ours["ttft_s"][kind]
        said.append((f"TTFT {kind} {value:.3f} s; the best other: {best:.3f} ({name})", value <= best))
    return [f"{'holds' if holds else 'DOES NOT HOLD'}: {text}" for text, holds in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="default: a made one")
    parser.add_argument("--fidelity", choices=("fast", "exact"), default="fast")
    parser.add_argument("--seconds", type=float, help="only the first ones of the trace")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--scale", type=float, help="default: an eighth of the replicas")
    parser.add_argument("--wide", action="store_true", help="64 replicas as well, with 8 times the trace")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="also write all figures there")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace) if arguments.trace is not None else made_chats(900, 1800, 0)
    trace = within(trace, arguments.seconds)
    machine = simulated_machine(
        Model(name="bench", source="nowhere", engine={"async_scheduling": True}), REPLICA, "bench"
    )
    everything = []
    for replicas in [arguments.replicas, *([64] if arguments.wide else [])]:
        scale = arguments.scale or replicas / 8
        for seed in arguments.seeds:
            asked = scaled(trace, scale, seed)
            print(f"\n{replicas} replicas, {scale:g} times the trace, {len(asked):,} requests, {arguments.fidelity}")
            print(
                f"{'':<26}{'hits':>7}{'of LRU':>8}{'TTFT s':>9}{'p50':>9}{'p99':>9}{'TPOT ms':>9}{'load':>7}{'us':>8}"
                f"{'took s':>7}"
            )
            found = {}
            for policy in arguments.policies:
                begun = time.monotonic()
                found[policy] = serve(machine, asked, replicas, policy, seed, arguments.fidelity)
                print(row(policy, found[policy], time.monotonic() - begun), flush=True)
            if OURS in found and len(found) > 1:
                print("\n".join(verdict(found)), flush=True)
            everything.append({"replicas": replicas, "scale": scale, "seed": seed, "policies": found})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
