"""What nine modest tenants feel of a greedy one on a real engine, and who gets how much of one that is full.

    python -m bench.fairness --rounds 3 --seconds 20      # about 15 minutes on two cores

vLLM's engine in this process, on one core, with a tiny Llama of random weights. The modest ones' requests (100 to 600
tokens in, 20 to 120 out) come in an open loop, by chance, 0.4 of what the engine does of them when a third of its slots
is taken; the greedy one always has more there than the engine can do. Sides, which take turns on the same engine with
the same arrivals:

- `alone`: without the greedy one.
- `off`: with it, and requests say nothing of whose they are: in the order of arrival.
- `on`: with it; they do.

TTFT is from when a request was due, so that a generator that is late is no advantage. Printed are medians over the
rounds, and ratios to `alone` of the same round; the second line of a side is of all rounds together. Then three tenants
that always want more, of weights 1, 2 and 3, share the engine: tokens as they are charged (an output's count twice),
by weight, against their mean.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bench import tiny_llama
from hycluster.core import Priority
from hycluster.engine.fairness import OUTPUT_COST, payer_headers
from hycluster.settings.model import Model
from hycluster.settings.pool import Hardware

if TYPE_CHECKING:
    from hycluster.engine.protocol import Frame
    from hycluster.engine.vllm import VllmEngine

SLOTS, STEP_TOKENS, CONTEXT_TOKENS, KV_TOKENS = 32, 1024, 16384, 131072
KV_TENSORS, FLOAT_BYTES = 2, 4
MODEST, CLIENT = 9, 1
PROMPT, OUTPUT = (100, 600), (20, 120)
# With so many of the modest ones' requests there at a time is measured what the engine can do; and this is asked of it.
AT_A_TIME, LOAD = SLOTS // 3, 0.4
# What an engine does first says nothing: it does not know yet how long its steps take, nor who is greedy.
SETTLE_S = 3.0
GREEDY = "greedy"


@dataclass(frozen=True)
class Endless:
    """So many calls of a tenant are always there. Ranges are in tokens.

    Attributes:
        n: answers that each of them asks for.
    """

    calls: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    n: int = 1


KINDS = {
    "many": Endless(300, (200, 400), (50, 150)),
    "long-prompts": Endless(50, (6000, 9000), (20, 50)),
    "long-outputs": Endless(200, (20, 50), (800, 1000)),
    "n": Endless(20, (200, 400), (50, 150), n=32),
    "all": Endless(100, (100, 9000), (50, 500)),
}


@dataclass
class Asked:
    """One request. Times are by the monotonic clock."""

    tenant: str
    prompt: int
    due_s: float
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int = 0


@dataclass
class Window:
    """What was measured in one window.

    Attributes:
        ttft, tpot: of the modest ones, in seconds.
        charged: by tenant, tokens as they are charged.
    """

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    charged: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Load:
    """Requests to one engine, and what becomes of them."""

    def __init__(self, engine: VllmEngine) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder

        self._engine = engine
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._numbers = itertools.count()
        self.asked: dict[str, Asked] = {}
        self.ended: queue.Queue[Asked] = queue.Queue()
        self.listening = threading.Thread(target=self._listen, daemon=True)
        self.listening.start()

    def ask(self, tenant: str, prompt: int, output: int, due_s: float, weight: float | None, n: int = 1) -> None:
        """A call, as a front end sends it: each of its ``n`` answers is a request with the same prompt.

        Args:
            weight: of the tenant; None: the engine is not told whose it is.
        """
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackEncoder

        number = next(self._numbers)
        # No two prompts have a block in common.
        tokens = [3 + number % 250, 3 + number // 250 % 250, *(3 + i * 31 % 250 for i in range(prompt - 2))]
        for copy in range(n):
            name = f"{number}-{copy}"
            self.asked[name] = Asked(tenant, prompt, due_s)
            request = EngineCoreRequest(
                request_id=name,
                prompt_token_ids=tokens,
                mm_features=None,
                sampling_params=SamplingParams(max_tokens=output, temperature=0, ignore_eos=True),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                priority=int(Priority.ONLINE),
                trace_headers=None if weight is None else payer_headers(tenant, weight),
            )
            self._engine.add(CLIENT, cast("Sequence[Frame]", MsgpackEncoder().encode(request)))

    def _listen(self) -> None:
        while (message := self._engine.next_output()) is not None:
            now = time.monotonic()
            for output in self._decoder.decode(message[1]).outputs:
                if (asked := self.asked.get(output.request_id)) is None:
                    continue
                if output.new_token_ids:
                    asked.first_s, asked.last_s = asked.first_s or now, now
                    asked.tokens += len(output.new_token_ids)
                if output.finish_reason is not None:
                    self.ended.put(asked)

    def charged(self) -> dict[str, float]:
        """By tenant, of all that was asked since ``clear``."""
        found: dict[str, float] = defaultdict(float)
        for asked in list(self.asked.values()):
            if asked.first_s is not None:
                found[asked.tenant] += asked.prompt + OUTPUT_COST * asked.tokens
        return found

    def clear(self) -> None:
        """Drop all that is there."""
        self._engine.abort(CLIENT, list(self.asked))
        while self._engine.load().running or self._engine.load().waiting:
            time.sleep(0.05)
        self.asked.clear()
        while not self.ended.empty():
            self.ended.get()


def serve(
    load: Load,
    coming: Iterator[tuple[float, str, int, int]],
    endless: Mapping[str, Endless],
    seconds: float,
    weights: Mapping[str, float | None],
) -> Window:
    """One window, which begins when things have settled.

    Args:
        coming: seconds from now, tenant, tokens in and out.
        weights: by tenant; None: the engine is not told whose its requests are.
    """
    chance = random.Random(7)
    begun = time.monotonic()
    until = begun + SETTLE_S + seconds
    left: dict[str, int] = defaultdict(int)

    def more(tenant: str) -> None:
        kind = endless[tenant]
        load.ask(
            tenant, chance.randint(*kind.prompt), chance.randint(*kind.output), time.monotonic(), weights[tenant],
            kind.n,
        )  # fmt: skip

    for tenant, kind in endless.items():
        for _ in range(kind.calls):
            more(tenant)
    due, tenant, prompt, output = next(coming)
    before: dict[str, float] | None = None
    while (now := time.monotonic()) < until:
        if before is None and now >= begun + SETTLE_S:
            before = load.charged()
        if now >= begun + due:
            load.ask(tenant, prompt, output, begun + due, weights[tenant])
            due, tenant, prompt, output = next(coming)
            continue
        try:
            ended = load.ended.get(timeout=max(0.0, min(begun + due, until) - now))
        except queue.Empty:
            continue
        if ended.tenant in endless:
            left[ended.tenant] += 1
            if left[ended.tenant] % endless[ended.tenant].n == 0:
                more(ended.tenant)
    window, now = Window(), time.monotonic()
    for each, tokens in load.charged().items():
        window.charged[each] = tokens - (before or {}).get(each, 0.0)
    for asked in list(load.asked.values()):
        if asked.tenant in endless or asked.due_s < begun + SETTLE_S:
            continue
        # One that has no token yet has waited until now.
        window.ttft.append((asked.first_s or now) - asked.due_s)
        if asked.first_s is not None and asked.tokens > 1:
            window.tpot.append((asked.last_s - asked.first_s) / (asked.tokens - 1))
    load.clear()
    return window


def modest_tenants() -> list[str]:
    return [f"modest-{number}" for number in range(MODEST)]


def modest(rate: float, seed: int) -> Iterator[tuple[float, str, int, int]]:
    """So many a second, all of them together."""
    chance, at_s = random.Random(seed), 0.0
    while True:
        at_s += chance.expovariate(rate)
        yield at_s, chance.choice(modest_tenants()), chance.randint(*PROMPT), chance.randint(*OUTPUT)


def nobody() -> Iterator[tuple[float, str, int, int]]:
    yield float("inf"), "", 0, 0


def sustained(load: Load, seconds: float) -> float:
    """Requests a second of the modest ones' kind that end where so many as are to be there at a time are."""
    chance, begun, ended = random.Random(0), time.monotonic(), 0

    def more() -> None:
        load.ask("warm", chance.randint(*PROMPT), chance.randint(*OUTPUT), time.monotonic(), None)

    for _ in range(AT_A_TIME):
        more()
    while time.monotonic() < begun + seconds:
        load.ended.get()
        ended += 1
        more()
    load.clear()
    return ended / (time.monotonic() - begun)


def started(folder: Path, kv_token_bytes: int) -> VllmEngine:
    from hycluster.engine.vllm import VllmEngine

    model = Model(
        name="tiny",
        source=str(folder),
        engine={"max_model_len": CONTEXT_TOKENS, "max_num_seqs": SLOTS, "max_num_batched_tokens": STEP_TOKENS},
        hardware=Hardware(kv_cache_gib=KV_TOKENS * kv_token_bytes / 2**30),
    )
    return VllmEngine(model, model.source)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def figures(window: Window) -> list[float]:
    """TTFT p50 and p99, TPOT p50 and p99, in ms."""
    return [1e3 * percentile(values, share) for values in (window.ttft, window.tpot) for share in (0.5, 0.99)]


def print_sides(kind: str, found: Mapping[str, list[Window]]) -> None:
    alone = [figures(window) for window in found["alone"]]
    together = {
        side: figures(Window([t for w in windows for t in w.ttft], [t for w in windows for t in w.tpot]))
        for side, windows in found.items()
    }
    for side, windows in found.items():
        rows = [figures(window) for window in windows]
        ratios = [[mine / its for mine, its in zip(*pair, strict=True)] for pair in zip(rows, alone, strict=True)]
        for name, values, against in (
            (side, [statistics.median(c) for c in zip(*rows, strict=True)],
             [statistics.median(c) for c in zip(*ratios, strict=True)]),
            ("", together[side], [m / a for m, a in zip(together[side], together["alone"], strict=True)]),
        ):  # fmt: skip
            line = f"{kind if name else '':<14}{name:<8}" + "".join(f"{value:>10.1f}" for value in values)
            print(line + "".join(f"{ratio:>8.2f}" for ratio in against))
    shares = [window.charged[GREEDY] / sum(window.charged.values()) for window in found["on"]]
    print(f"{'':<14}the greedy one has {statistics.median(shares):.0%} of the tokens", flush=True)


def print_weights(load: Load, kinds: list[str], seconds: float) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    endless = {tenant: KINDS[kind] for tenant, kind in zip(weights, kinds, strict=True)}
    window = serve(load, nobody(), endless, seconds, weights)
    had = {tenant: window.charged[tenant] / weight for tenant, weight in weights.items()}
    mean = statistics.mean(had.values())
    said = ", ".join(f"{weights[tenant]:g} ({kinds[n]}) {had[tenant] / mean:.3f}" for n, tenant in enumerate(weights))
    print(f"shares by weight: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of a window")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--sides", default="alone,off,on", help="of alone, off, on; alone is among them")
    parser.add_argument("--rate", type=float, help="modest requests a second; default: by what the engine can do")
    parser.add_argument("--hidden", type=int, default=64, help="of the model; at 64 a step takes little but Python")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
    with tempfile.TemporaryDirectory() as work:
        size = {"hidden": args.hidden, "layers": args.layers}
        folder = tiny_llama.make(Path(work) / "model", context_tokens=CONTEXT_TOKENS, **size)
        engine = started(folder, args.layers * KV_TENSORS * args.hidden * FLOAT_BYTES)
        load = Load(engine)
        sustained(load, 5)
        rate = args.rate or LOAD * sustained(load, 10)
        print(f"{rate:.1f} modest requests a second")
        columns = ("TTFT p50", "p99", "TPOT p50", "p99")
        print(f"{'ms':<22}" + "".join(f"{column:>10}" for column in columns) + "   of alone")
        for kind in filter(None, args.kinds.split(",")):
            found: dict[str, list[Window]] = {side: [] for side in args.sides.split(",")}
            for seed in range(args.rounds):
                # Whoever goes first goes last in the next round.
                for side in list(found)[:: 1 if seed % 2 == 0 else -1]:
                    endless: dict[str, Endless] = {} if side == "alone" else {GREEDY: KINDS[kind]}
                    weights = dict.fromkeys((GREEDY, *modest_tenants()), None if side == "off" else 1.0)
                    window = serve(load, modest(rate, seed), endless, args.seconds, weights)
                    found[side].append(window)
                    said = " ".join(f"{value:.1f}" for value in figures(window))
                    print(f"{kind} {side}: {len(window.ttft)} requests, {said}", file=sys.stderr, flush=True)
            print_sides(kind, found)
        for kinds in (["many"] * 3, ["many", "long-outputs", "long-prompts"]):
            print_weights(load, kinds, args.seconds)
        engine.shutdown()


if __name__ == "__main__":
    main()
