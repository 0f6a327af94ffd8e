"""What metrics and traces cost an ingress process, to the half of a per cent: CPU time a request, in short slices.

    python -m bench.overhead [--blocks 200] [--requests 64] [--callers 32] [--tokens 64] [--apart] [--step-ms 0]

The process, on one core, has the whole HTTP ingress (uvicorn, vLLM's app, the gateway, its sockets) and a simulated
engine, whose steps take no time, or all the same. It begins with them when all callers have asked, so that a message of
its has a token for each of them, as one of an engine has that runs a model; with ``--apart`` it does not wait, and most
messages have one token, which is the most that there is to be counted. Its caller (``bench.load``) and the collector
that gets the traces are others, on the other cores. A block is a slice of each side, in an order that is drawn anew; a
slice is so many requests, and what is counted is CPU time of all threads, with what the exporter sends of it. Of a side
each block gives a ratio to its ``off``; told are the median of all blocks' and the bounds within which it lies by 95 in
100, by the order of the ratios alone. What slows a machine for longer than a block is so in both parts of the ratio.
``off-again`` is ``off`` once more: as far as its bounds are from 1, this machine can't tell.

off: nothing is counted or exported. metrics: what ``/metrics`` has. traces-1, traces-100: metrics, and so many per cent
of the requests' traces are exported. keys: metrics, each caller has a key, limits of each kind that are far away, and a
line in the usage ledger. all-layers: metrics, and a request goes through all layers of vLLM's app
(``hycluster/ingress/fast_path.py``); ``--tokens 1`` shows best what that costs. Timelines, of which ``hycluster why``
lives, are kept on all sides. Where engines have models to run, a request costs them many times what it costs here: what
is told in ms is to be set against that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench import load, tiny_llama
from bench.request_cost import collector, ingress, ledger
from hycluster.auth.limits import Limit
from hycluster.engine.simulated import SimulatedEngine
from hycluster.imports import without_collector
from hycluster.observe.export import Export, sampler_of
from hycluster.observe.timelines import never, recorder
from hycluster.settings.auth import Auth
from hycluster.settings.observe import Tracing
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import keyed

BASE = "off"


@dataclass(frozen=True, slots=True)
class Side:
    """Attributes: counts: it has metrics. share: of traces, exported. keys: it asks for a key, limits, and bills.
    short: a request that is right goes past the layers of vLLM's app."""

    counts: bool = True
    share: float | None = None
    keys: bool = False
    short: bool = True


SIDES = {
    BASE: Side(counts=False), "off-again": Side(counts=False), "metrics": Side(), "traces-1": Side(share=0.01),
    "traces-100": Side(share=1.0), "keys": Side(keys=True), "all-layers": Side(short=False),
}  # fmt: skip
TOKENS = 64
MANY = 10**9
FAR = Limit(
    "acme", "search", requests_per_minute=MANY, tokens_per_minute=MANY, tokens_per_day=MANY, concurrent_requests=MANY,
    budget_per_month=MANY,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Median:
    """Of some values, and within which bounds that of all lies, by 95 in 100."""

    value: float
    low: float
    high: float


def median_of(values: Sequence[float]) -> Median:
    """By a binomial's normal approximation to the ranks of the bounds; of few values, the outermost ones."""
    ordered, number = sorted(values), len(values)
    rank = max(0, math.floor((number - 1.96 * math.sqrt(number)) / 2))
    return Median(statistics.median(ordered), ordered[rank], ordered[number - 1 - rank])


class Caller:
    """A process that asks so much as it is told to."""

    def __init__(self, process: asyncio.subprocess.Process, tokens: int = TOKENS) -> None:
        self._process = process
        self._tokens = tokens

    async def ask(self, url: str, requests: int, callers: int, api_key: str | None = None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"url": url, "requests": requests, "concurrency": callers, "api_key": api_key}
        asked["max_tokens"] = self._tokens
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        said = json.loads(await self._process.stdout.readline())
        if said["failed"]:
            raise SystemExit(f"not all requests were answered: {said}")


@contextlib.asynccontextmanager
async def calling(tokens: int = TOKENS) -> AsyncIterator[Caller]:
    """One, on the cores that this process is not on."""
    command = (sys.executable, "-m", "bench.overhead", "--as-caller")
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Caller(process, tokens)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def call() -> None:
    """What that process does."""
    os.sched_setaffinity(0, others_than(own_core()))
    for line in sys.stdin:
        said = uvloop.run(load.run(model="tiny", prompt_chars=64, pids=[], **json.loads(line)))
        print(json.dumps({"failed": said.failed}), flush=True)


def own_core() -> int:
    return min(range(os.cpu_count() or 1))


def others_than(core: int) -> set[int]:
    return set(range(os.cpu_count() or 1)) - {core} or {core}


def step_together(callers: int) -> None:
    """Have simulated engines of this process begin when so many requests have come, and end them together."""
    step, whole = SimulatedEngine._step, set[int]()

    def begin_together(engine: SimulatedEngine) -> bool:
        def enough() -> bool:
            if not engine._scheduler.has_work:
                whole.discard(id(engine))
            elif engine.load().waiting >= callers:
                whole.add(id(engine))
            return engine._ended or id(engine) in whole

        with engine._changed:
            engine._changed.wait_for(enough)
        return step(engine)

    SimulatedEngine._step = begin_together  # type: ignore[method-assign, assignment]


async def measure(blocks: int, requests: int, callers: int, step_s: float, tokens: int) -> dict[str, list[float]]:
    """By side, CPU ms a request in each block."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    engine = Simulated(
        vocab_size=256, max_model_len=2048, step_base_s=step_s, prefill_token_s=0, decode_token_s=0,
        realtime=step_s > 0,
    )  # fmt: skip
    draw = random.Random(17)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        endpoint = stack.enter_context(collector())
        caller = await stack.enter_async_context(calling(tokens))
        source = tiny_llama.make(Path(folder) / "model")
        counting = await stack.enter_async_context(ingress(source, engine, counts=True))
        other = await stack.enter_async_context(ingress(source, engine, counts=False))
        keys = stack.enter_context(keyed(Path(folder), Auth().poll_s))
        keys.store.set_limit(FAR)
        guarded = await stack.enter_async_context(ingress(source, engine, counts=True, keys=keys))
        layered = await stack.enter_async_context(ingress(source, engine, counts=True, short=False))
        key = keys.key()
        export = Export(recorder, Tracing(endpoint=endpoint, sample_ratio=1.0), environment={})
        stack.callback(export.close)
        exported_by = list(recorder.ended)

        async def cpu_ms(side: str) -> float:
            of = SIDES[side]
            recorder.ended[:] = [] if of.share is None else exported_by
            recorder.samples = never if of.share is None else sampler_of(Tracing(sample_ratio=of.share), {})
            with ledger(Path(folder)) if of.keys else contextlib.nullcontext():
                gc.collect()
                begun_s = time.process_time()
                if of.keys:
                    await caller.ask(guarded, requests, callers, key)
                else:
                    plain = counting if of.short else layered
                    await caller.ask(plain if of.counts else other, requests, callers)
                if of.share is not None:
                    await asyncio.to_thread(recorder.flush)
                ended_s = time.process_time()
            return 1000 * (ended_s - begun_s) / requests

        for _ in range(3):
            for side in SIDES:
                await cpu_ms(side)
        gc.collect()
        gc.freeze()
        for block in range(1, blocks + 1):
            for side in draw.sample(list(SIDES), len(SIDES)):
                found[side].append(await cpu_ms(side))
            if block % 10 == 0 or block == blocks:
                print(f"{block:>4} blocks: " + told(found), flush=True)
        recorder.ended[:] = exported_by
    return found


def compared(found: dict[str, list[float]], base: str = BASE) -> dict[str, Median]:
    """By side, its blocks' ratios to another one's."""
    return {
        side: median_of([own / its for own, its in zip(ms, found[base], strict=True)])
        for side, ms in found.items()
        if side != base
    }


def added_ms(found: dict[str, list[float]], side: str) -> Median:
    """What a request costs more than with ``off``."""
    return median_of([own - its for own, its in zip(found[side], found[BASE], strict=True)])


def told(found: dict[str, list[float]]) -> str:
    return ", ".join(
        f"{side} {each.value:.4f} ({each.low:.4f} to {each.high:.4f})" for side, each in compared(found).items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--requests", type=int, default=64, help="in each slice; so many times the callers")
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")
    parser.add_argument("--apart", action="store_true", help="the engine does not wait for all callers")
    parser.add_argument("--step-ms", type=float, default=0.0, help="0: as fast as it computes")
    parser.add_argument("--as-caller", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_caller:
        call()
        return
    if not args.apart:
        if args.requests % args.callers:
            parser.error(f"--requests: {args.requests} is not allowed; must be a multiple of --callers {args.callers}")
        step_together(args.callers)
    # Before there are threads, which all have what the first one has.
    os.sched_setaffinity(0, {own_core()})
    with without_collector():
        import hycluster.ingress.http  # noqa: F401
    found = uvloop.run(measure(args.blocks, args.requests, args.callers, args.step_ms / 1000, args.tokens))
    ratios, by_metrics = compared(found), compared(found, "metrics")
    print(f"\n{'side':<12}{'ms':>7}{'more than off, ms':>27}{'of off':>25}{'of metrics':>25}")
    for side, ms in found.items():
        added = added_ms(found, side) if side != BASE else None
        columns = (added, ratios.get(side), by_metrics.get(side) if SIDES[side].counts else None)
        cells = (f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" if each else "" for each in columns)
        print(
            f"{side:<12}{statistics.median(ms):>7.2f}"
            + "".join(f"{cell:>{25 + 2 * (at == 0)}}" for at, cell in enumerate(cells))
        )


if __name__ == "__main__":
    main()
