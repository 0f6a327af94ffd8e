"""How near virtual time comes to a real engine, and what colocation does where steps are bound by memory.

    python -m bench.simulate real            # less than 4 minutes on two idle cores
    python -m bench.simulate gpu --trace conversations.jsonl.gz --seconds 600

`real` starts the embedded model on one core, fits its step times, and serves a made trace on it, alone and beside a
job; then the same trace in virtual time, once with what was fitted before, once with a fit to the steps of that trace:
the first says how near a simulation comes, and the second how much of what it is off by is that the machine has become
faster or slower meanwhile. `gpu` is virtual time only: step times by the roofline of
H20 and H200, a real trace at 60% of the capacity, alone and beside a job without end, by hycluster's scheduler, by
vLLM's priority policy as it is, and by that with a bound on rows in flight. Behind what the job gets stands by how much
its rows lengthened the steps that had online work in them: with hycluster's scheduler at most by `max_slowdown`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.batch import settings as embedded
from hycluster.core import Priority
from hycluster.settings.model import Colocation, Model
from hycluster.settings.read import load_settings
from hycluster.simulate.traces import TraceRequest, read_trace, scaled, within

ROOT = Path(__file__).parents[1]
BULK_TOKENS = 60, 16
IN_FLIGHT = 64
BULK_ON_GPU = 512, 128
KINDS, COLUMNS = ("ttft_s", "tpot_s"), ("mean", "p50", "p99")
# By how much virtual time may be off.
BOUNDS = {"p50": 0.1, "p99": 0.2}
# How long a run is measured for a fit, and a job is there before the trace.
FIT_S, LEAD_S = 40.0, 10.0
# By name: settings, the model's shape, data type of the weights, other settings.
MODELS: dict[str, tuple[str, str, str, list[str]]] = {
    "hunyuan-large": ("deployments/hunyuan-large-fp8-8xh20.yaml", "hycluster/models/hunyuan_large.json", "fp8", []),
    "llama-3.1-8b": (
        "deployments/hunyuan-a13b-fp8-2xh20.yaml", "tests/planning/published/llama-3.1-8b.json", "bfloat16",
        ["models.0.parallel={}", "models.0.engine.kv_cache_dtype=auto", "models.0.routing={}"],
    ),
}  # fmt: skip
SIDES: dict[str, tuple[Colocation, int | None]] = {
    "colocation": (Colocation(), None),
    "priority": (Colocation(enabled=False), None),
    "bound of 16": (Colocation(enabled=False), 16),
}


def short_chats(seconds: float, rate: float, seed: int) -> list[TraceRequest]:
    """Arrivals at random; lengths about those of a short chat."""
    rng, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + rng.expovariate(rate)) < seconds:
        found.append(TraceRequest(at_s, rng.randrange(20, 120), rng.randrange(8, 40)))
    return [dataclasses.replace(each, at_s=each.at_s - found[0].at_s) for each in found]


def row(name: str, spreads: Mapping[str, Mapping[str, Any]], more: str = "") -> None:
    cells = [spreads[kind][at] for kind in KINDS for at in COLUMNS]
    print(f"{name:<28}" + "".join(f"{1e3 * cell:>10.1f}" for cell in cells) + f"  {more}", flush=True)


def header(title: str) -> None:
    names = [f"{kind[:4].upper()} {at}" for kind in KINDS for at in COLUMNS]
    print(f"\n{title}\n{'ms':<28}" + "".join(f"{name:>10}" for name in names), flush=True)


def real(arguments: argparse.Namespace) -> None:
    """In a process with a replica's environment."""
    from hycluster.engine.arguments import engine_environment, model_files

    model = Model.model_validate(embedded()["models"][0])
    said = {"path": model_files(model), "seconds": arguments.seconds, "rate": arguments.rate, "seed": arguments.seed}
    environment = {**os.environ, **engine_environment(model), "BENCH_SIMULATE": json.dumps(said)}
    raise SystemExit(
        subprocess.run([sys.executable, "-m", "bench.simulate", "real"], check=False, env=environment).returncode
    )


def real_here(path: str, seconds: float, rate: float, seed: int) -> None:
    from hycluster.simulate.bulk import BulkJob
    from hycluster.simulate.calibrate import coefficients, fitted_settings, measure
    from hycluster.simulate.figures import latencies, spread_of
    from hycluster.simulate.machine import simulated_machine
    from hycluster.simulate.real_engine import RealEngine
    from hycluster.simulate.run import Simulation

    model = Model.model_validate(embedded()["models"][0])
    engine = RealEngine(model, path)
    fits = {"virtual time": measure(engine, FIT_S)}
    print(f"{len(engine.notes.steps)} steps in the fit's run")
    requests = short_chats(seconds, rate, seed)
    measured, begun = {}, len(engine.notes.steps)
    for beside in (False, True):
        measured[beside] = replay(engine, requests, beside)
    fits["its own steps"] = coefficients(engine.notes.steps[begun:])
    engine.close()
    asynchronous = bool(engine.config.scheduler_config.async_scheduling)
    simulations = {}
    for name, fit in fits.items():
        simulated = fitted_settings(fit, engine.sizes)
        print(f"{name}: off by {fit.error:.1%} of a step on average: {simulated.model_dump()}")
        machine = dataclasses.replace(simulated_machine(model, simulated, "fitted"), asynchronous=asynchronous)
        simulations[name] = Simulation(machine, model.colocation)
    for beside, (times, bulk_rate) in measured.items():
        header(f"{'beside a job' if beside else 'alone'}: {len(requests)} requests in {seconds:.0f} s")
        job = BulkJob(*BULK_TOKENS, in_flight=IN_FLIGHT) if beside else None
        true = {kind: spread_of(values) for kind, values in times.items()}
        row("real engine", true, f"bulk {bulk_rate:.1f} tokens/s" if beside else "")
        for name, simulation in simulations.items():
            outcome, found = simulation.serve(requests, job)
            virtual = latencies(outcome)
            row(name, virtual, f"bulk {found['bulk']['tokens_per_s']:.1f} tokens/s" if beside else "")
            off = [virtual[kind][at] / (true[kind][at] or 1) - 1 for kind in KINDS for at in COLUMNS]
            holds = all(abs(value) <= BOUNDS.get(at, math.inf) for value, at in zip(off, COLUMNS * 2, strict=True))
            print(f"{'off by':<28}" + "".join(f"{each:>+10.1%}" for each in off), end="  ")
            print("holds" if holds else "DOES NOT HOLD", flush=True)


def replay(engine: Any, requests: list[TraceRequest], beside: bool) -> tuple[dict[str, list[float]], float]:
    """Serve a trace on the real engine: TTFT and TPOT of its requests, and output tokens/s of the job beside it."""
    stop, rng = threading.Event(), random.Random(1)
    names = [f"online-{beside}-{number}" for number in range(len(requests))]

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(1 << 30) for _ in range(tokens)]

    def feed() -> None:
        asked = 0
        over = begun = engine.over()
        while not stop.is_set():
            while asked - (over - begun) < IN_FLIGHT:
                engine.ask(f"bulk-{asked}", prompt(BULK_TOKENS[0]), BULK_TOKENS[1], Priority.BATCH)
                asked += 1
            over = engine.over("bulk-", more_than=over - begun, within_s=1.0) + begun

    feeder = threading.Thread(target=feed)
    if beside:
        feeder.start()
        time.sleep(LEAD_S)
    begin, come = time.monotonic(), dict[str, float]()
    for name, request in zip(names, requests, strict=True):
        time.sleep(max(0.0, begin + request.at_s - time.monotonic()))
        come[name] = time.monotonic()
        engine.ask(name, prompt(request.prompt_tokens), request.output_tokens)
    end = time.monotonic()
    engine.wait(*names)
    stop.set()
    if beside:
        feeder.join()
    bulk = [at for name, times in engine.tokens.items() if name.startswith("bulk-") for at in times]
    engine.abort_all()
    times = {name: engine.tokens[name] for name in names}
    return {
        "ttft_s": [times[name][0] - come[name] for name in names],
        "tpot_s": [(each[-1] - each[0]) / (len(each) - 1) for each in times.values() if len(each) > 1],
    }, sum(begin < at <= end for at in bulk) / (end - begin)


def gpu(arguments: argparse.Namespace) -> None:
    from hycluster.simulate.bulk import BulkJob
    from hycluster.simulate.figures import latencies
    from hycluster.simulate.machine import OnGpu, machine_of
    from hycluster.simulate.run import Simulation

    trace = within(read_trace(arguments.trace), arguments.seconds)
    for name in arguments.models.split(","):
        deployment, shape, weights, assignments = MODELS[name]
        model = load_settings(ROOT / deployment, assignments).models[0]
        for gpu_name in arguments.gpus.split(","):
            machine = machine_of(model, OnGpu(gpu_name, ROOT / shape, weights))
            vllm = Simulation(machine, SIDES["priority"][0], seed=arguments.seed)
            begun = time.monotonic()
            scale = arguments.scale or vllm.scale_for(trace, arguments.load)
            requests = scaled(trace, scale, arguments.seed)
            compared = vllm.compare(requests, BulkJob(*BULK_ON_GPU))
            left, alone = compared["left_over_tokens_per_s"], compared["alone"]
            header(
                f"{name}, {machine.source}, {arguments.trace.name} x {scale:.3g}: {len(requests)} requests in"
                f" {arguments.seconds:.0f} s, {compared['online_load']:.0%} of the capacity; the job alone:"
                f" {compared['bulk_alone_tokens_per_s']:.0f} tokens/s, left over {left:.0f}"
            )
            row("alone", alone, f"{time.monotonic() - begun:.0f} s")
            for side in arguments.sides.split(","):
                begun = time.monotonic()
                colocation, in_flight = SIDES[side]
                if arguments.max_slowdown is not None:
                    colocation = colocation.model_copy(update={"max_slowdown": arguments.max_slowdown})
                simulation = dataclasses.replace(vllm, colocation=colocation)
                outcome, found = simulation.serve(requests, BulkJob(*BULK_ON_GPU, in_flight=in_flight))
                bulk = found["bulk"]["tokens_per_s"]
                beside = latencies(outcome)
                slower = found["bulk"]["slowdown"] or 0.0
                more = f"bulk {bulk:.0f} ({bulk / left:.2f}), {slower:+.1%}, {time.monotonic() - begun:.0f} s"
                row(side, beside, more)
                ratios = [beside[kind][at] / alone[kind][at] for kind in KINDS for at in COLUMNS]
                print(f"{'':<28}" + "".join(f"{each:>9.2f}x" for each in ratios), flush=True)


def main() -> None:
    if said := os.environ.pop("BENCH_SIMULATE", None):
        real_here(**json.loads(said))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["real", "gpu"])
    parser.add_argument("--seconds", type=float, default=60, help="of the trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.5, help="real: online requests a second")
    parser.add_argument("--trace", type=Path, help="gpu: a file of requests")
    parser.add_argument("--load", type=float, default=0.6, help="gpu: share of the capacity")
    parser.add_argument("--scale", type=float, help="gpu: of the trace, in place of --load")
    parser.add_argument("--max-slowdown", type=float, help="gpu: in place of the setting's default")
    parser.add_argument("--gpus", default="H20,H200")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sides", default=",".join(SIDES))
    arguments = parser.parse_args()
    if arguments.what == "real":
        real(arguments)
    elif arguments.trace is None:
        parser.error("gpu: needs --trace")
    else:
        gpu(arguments)


if __name__ == "__main__":
    main()
