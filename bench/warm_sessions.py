"""Conversations beside one-off prompts on one engine: what of each is found cached, by how long sessions are kept.

    python -m bench.warm_sessions          # about 2 minutes

vLLM's own scheduler and KV cache manager in virtual time (``VirtualEngine``): 24 conversations at a time, whose turns
grow by 600 tokens after pauses of 30 s in the mean, and prompts of 4,000 tokens that come once a `gap`, of which the
first 1,000 are one of four system prompts and the rest never comes again. The cache holds 4,000 blocks of 16 tokens. Of
``colocation.keep_sessions_s`` 0 is vLLM as it is. Hits are parts of the prompts' tokens; TTFT in seconds.
"""

from __future__ import annotations

import argparse
import heapq
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from bench import tiny_llama
from hycluster.core import Priority
from hycluster.engine.step_time import StepWork
from hycluster.engine.vllm import engine_config
from hycluster.settings.model import Colocation, Model
from hycluster.simulate.engine import VirtualEngine

BLOCKS, BLOCK_TOKENS = 4000, 16
CONVERSATIONS, TURN_TOKENS, PAUSE_S, TURNS = 24, 600, 30.0, 8
ONCE_TOKENS, SYSTEM_TOKENS, SYSTEMS = 4000, 1000, 4
OUTPUT_TOKENS = 100
Asked = tuple[float, str, list[int], str | None]


def step_time(work: StepWork) -> float:
    return 0.01 + 2e-5 * work.prefill_tokens + 5e-5 * work.sequences


def asked(gap_s: float, seconds: float, seed: int) -> Iterator[Asked]:
    """When, its name, the prompt, the session; in the order in which they come."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(250) for _ in range(count)]

    systems = [tokens(SYSTEM_TOKENS) for _ in range(SYSTEMS)]
    coming: list[tuple[float, int, list[int], int]] = []
    for number in range(CONVERSATIONS):
        heapq.heappush(coming, (rng.random() * PAUSE_S, number, tokens(TURN_TOKENS), 1))
    begun, once_at, count = CONVERSATIONS, 0.0, 0
    while True:
        count += 1
        if once_at <= coming[0][0]:
            if once_at > seconds:
                return
            prompt = rng.choice(systems) + tokens(ONCE_TOKENS - SYSTEM_TOKENS)
            yield once_at, f"once-{count}", prompt, None
            once_at += rng.expovariate(1 / gap_s)
            continue
        at_s, number, prompt, turn = heapq.heappop(coming)
        yield at_s, f"turn{turn}-{count}", prompt, str(number)
        pause_s = rng.expovariate(1 / PAUSE_S)
        if turn < TURNS:
            heapq.heappush(coming, (at_s + pause_s, number, [*prompt, *tokens(TURN_TOKENS)], turn + 1))
        else:
            # It has ended; nobody says so. Another one begins.
            heapq.heappush(coming, (at_s + pause_s, begun, tokens(TURN_TOKENS), 1))
            begun += 1


def serve(folder: Path, keep_s: float, gap_s: float, seconds: float, seed: int) -> dict[str, tuple[float, float]]:
    """By kind, the part of the prompts' tokens that was found, and the mean TTFT."""
    arguments = {
        "max_model_len": 8192, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "block_size": BLOCK_TOKENS,
        "hf_overrides": {"max_position_embeddings": 8192},
    }  # fmt: skip
    colocation = Colocation(keep_sessions_s=keep_s)
    model = Model(name="m", source=str(folder), engine=arguments, colocation=colocation)
    engine = VirtualEngine(engine_config(model, str(folder)), BLOCKS, step_time)
    coming, came = asked(gap_s, seconds, seed), dict[str, tuple[float, int]]()
    found: dict[str, list[tuple[int, int, float]]] = {"turns": [], "once": []}
    following = next(coming, None)
    while following is not None or engine.has_work:
        while following is not None and (following[0] <= engine.now_s or not engine.has_work):
            at_s, name, prompt, session = following
            engine.now_s = max(engine.now_s, at_s)
            engine.add(name, prompt, OUTPUT_TOKENS, int(Priority.ONLINE), at_s, session_id=session)
            came[name] = at_s, len(prompt)
            following = next(coming, None)
        for token in engine.step():
            if (here := came.pop(token.request_id, None)) is not None:
                kind = "once" if token.request_id.startswith("once") else "turns"
                found[kind].append((token.cached, here[1], token.at_s - here[0]))
    found["all"] = [*found["turns"], *found["once"]]
    return {
        kind: (sum(one[0] for one in each) / sum(one[1] for one in each), mean(one[2] for one in each))
        for kind, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--gaps", type=float, nargs="+", default=[4.0, 1.0, 0.5])
    parser.add_argument("--keep", type=float, nargs="+", default=[0, 15, 30, 60, 120])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    heads = "".join(f"{kind + ' hits':>14}{'TTFT':>8}" for kind in ("turns:", "once:", "all:"))
    print(f"{'gap s':>6}{'seed':>6}{'keep s':>8}{heads}")
    with tempfile.TemporaryDirectory() as work:
        folder = tiny_llama.make(Path(work) / "model")
        for gap_s in arguments.gaps:
            for seed in arguments.seeds:
                for keep_s in arguments.keep:
                    kinds = serve(folder, keep_s, gap_s, arguments.seconds, seed)
                    cells = "".join(f"{hits:>14.3f}{ttft:>8.3f}" for hits, ttft in kinds.values())
                    print(f"{gap_s:>6g}{seed:>6}{keep_s:>8g}{cells}", flush=True)


if __name__ == "__main__":
    main()
