"""``hycluster simulate``: a trace on the engines of the settings, in virtual time."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hycluster.errors import SettingsError, shown
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings
from hycluster.terminal import echo

if TYPE_CHECKING:
    from hycluster.settings.model import Model
    from hycluster.settings.simulated import Simulated
    from hycluster.simulate.bulk import BulkJob
    from hycluster.simulate.machine import Machine
    from hycluster.simulate.outcome import TraceOutcome
    from hycluster.simulate.traces import TraceRequest

SCHEDULERS = ("colocation", "priority")
FIDELITIES = ("exact", "fast")


def simulate(
    config: Annotated[Path, typer.Argument(metavar="SETTINGS", help="Settings file.")] = DEFAULT_SETTINGS,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Requests: Mooncake's JSON lines or Azure's CSV, gzipped or not."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Model; default: the only one of the settings.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Default: as many as the settings have at first.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the router chooses (docs/routing.md). Default: the settings' router.policy.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SCHEDULERS),
            help="In the engine: hycluster's, or vLLM's priority policy as it is. Default: by the settings.",
        ),
    ] = None,
    bulk: Annotated[
        str | None,
        typer.Option(
            metavar="IN:OUT[:ROWS]",
            help="A bulk job beside the trace: tokens in and out of a row; without ROWS it has no end.",
        ),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option("--bulk-in-flight", min=1, help="Its rows in flight, by engine; default: what fills one."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="With --bulk: also the trace alone, and the job alone.")
    ] = True,
    scale: Annotated[
        float | None,
        typer.Option(min=0.001, max=1000, help="Times the trace's load; its times and bursts stay. Default: 1."),
    ] = None,
    load: Annotated[
        float | None, typer.Option(min=0.01, max=10, help="Instead: scale it to so large a share of the capacity.")
    ] = None,
    duration_s: Annotated[
        float | None, typer.Option(min=0.001, help="Only so many seconds of the trace, from its begin.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Step times by the roofline of this GPU: H20, H200, ...")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With a GPU: the model's config.json; default: its source's.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="fp8|...", help="With a GPU: data type of the weights.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1, help="With a GPU: share of its peak that kernels reach.")
    ] = 0.7,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Measure step times: start the engine in this process and run it for a minute."),
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="URL", help="With --fit: take those that a running service has learned: its /metrics."),
    ] = None,
    fidelity: Annotated[
        str,
        typer.Option(
            metavar="|".join(FIDELITIES),
            help="vLLM's own scheduler in each engine, for tens of them; or counted blocks, for hundreds.",
        ),
    ] = "exact",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page: TTFT and hits over time, load by replica.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is left to chance: same seed, same numbers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Serve a trace by the engines of SETTINGS in virtual time: latencies, prefix hits, what is left for bulk jobs.

    vLLM's own scheduler and KV cache manager decide; only the model is replaced, by how long its steps take: as fitted
    (--fit), as the settings say (models[].simulated), or as a GPU's roofline has it. docs/simulate.md tells what of it
    is exact.
    """
    for option, value, needs in (
        ("--metrics", metrics, fit),
        ("--bulk-in-flight", in_flight, bulk is not None),
        ("--load", load, scale is None),
        ("--fidelity fast", bulk if fidelity == "fast" else None, False),
        ("--fidelity fast", load if fidelity == "fast" else None, False),
        ("--fidelity fast", scheduler if fidelity == "fast" else None, False),
        ("--html", html, trace is not None),
        ("--trace", None if trace is not None or fit else "", False),
    ):
        if value is not None and not needs:
            raise SettingsError(_NEEDS[option])
    settings = load_settings(config, assignments or [])
    if name is None and len(settings.models) > 1:
        raise SettingsError(f"--model: is missing; must be one of {', '.join(each.name for each in settings.models)}")
    model = settings.model(name or settings.models[0].name)
    job = _job(bulk, in_flight)
    chosen = scheduler or ("colocation" if model.colocation.enabled else "priority")
    if chosen not in SCHEDULERS:
        raise SettingsError(f"--scheduler: {shown(chosen)} is not allowed; must be one of {', '.join(SCHEDULERS)}")

    if fidelity not in FIDELITIES:
        raise SettingsError(f"--fidelity: {shown(fidelity)} is not allowed; must be one of {', '.join(FIDELITIES)}")

    from hycluster.simulate.choice import Choice
    from hycluster.simulate.machine import OnGpu, machine_of, simulated_machine
    from hycluster.simulate.traces import read_trace, within

    routing = policy or settings.router.policy
    Choice(routing, seed)
    if html is not None and not html.parent.is_dir():
        raise SettingsError(f"--html: {html.parent}: no such folder")
    requests = within(read_trace(trace), duration_s) if trace is not None else []
    _settle_vllm()
    machine: Machine
    if fit:
        fitted = _fit(model, metrics)
        machine = simulated_machine(model, fitted, "fitted")
        _say_fit(model, fitted, as_json, trace is None)
    else:
        machine = machine_of(model, OnGpu(gpu, model_config, weights, efficiency))
    if trace is None:
        return

    begun = time.monotonic()
    count = replicas or max(1, model.replicas.count)
    outcome: TraceOutcome
    if fidelity == "fast":
        from hycluster.simulate.fast import serve_fast

        times, chosen = scale or 1.0, "counted"
        requests = _scaled(requests, times, seed, trace)
        outcome, found = serve_fast(machine, requests, replicas=count, policy=routing, seed=seed)
    else:
        from hycluster.simulate.run import Simulation

        colocation = model.colocation.model_copy(update={"enabled": chosen == "colocation"})
        simulation = Simulation(machine, colocation, count, routing, seed)
        times = simulation.scale_for(requests, load) if load is not None else (scale or 1.0)
        requests = _scaled(requests, times, seed, trace)
        outcome, found = simulation.serve(requests, job)
        if job is not None and compare:
            found |= simulation.compare(requests, job)
    found |= {"scale": times, "seed": seed, "fidelity": fidelity, "scheduler": chosen, "policy": routing}
    if html is not None:
        from hycluster.simulate.page import html_page

        html.write_text(html_page(outcome, found))
    if as_json:
        echo(json.dumps(found, indent=2))
        return
    from hycluster.simulate.report import report_lines

    for line in report_lines(found):
        echo(line)
    wall = time.monotonic() - begun
    echo(f"simulated {outcome.end_s:.0f} s in {wall:.1f} s", err=True)


_NEEDS = {
    "--metrics": "--metrics: is where --fit reads; give --fit too, or leave it out",
    "--bulk-in-flight": "--bulk-in-flight: is of the job that --bulk makes; give --bulk too, or leave it out",
    "--load": "--load: can't be together with --scale; give one of the two",
    "--fidelity fast": "--fidelity: fast can't be together with --bulk, --load or --scheduler, which need vLLM's"
    " scheduler; must be exact there",
    "--html": "--html: shows what came of a trace; give --trace too, or leave it out",
    "--trace": "--trace: is missing; must be a file of requests (or give --fit alone, to measure step times)",
}


def _scaled(requests: list[TraceRequest], times: float, seed: int, trace: Path) -> list[TraceRequest]:
    from hycluster.simulate.traces import scaled

    found = scaled(requests, times, seed)
    if not found:
        raise SettingsError(f"--trace: {trace}: nothing is left of it at a scale of {times:.3g}")
    return found


def _job(bulk: str | None, in_flight: int | None) -> BulkJob | None:
    if bulk is None:
        return None
    from hycluster.simulate.bulk import BulkJob

    said = re.fullmatch(r"(\d{1,9}):(\d{1,9})(?::(\d{1,9}))?", bulk)
    numbers = [int(each) for each in said.groups() if each is not None] if said is not None else [0]
    if min(numbers) < 1:
        raise SettingsError(f"--bulk: {shown(bulk)} is not allowed; must be IN:OUT or IN:OUT:ROWS, each at least 1")
    return BulkJob(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else None, in_flight)


def _settle_vllm() -> None:
    """Its lines are for those who run an engine."""
    from hycluster import logs

    for key, value in logs.ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)


def _fit(model: Model, metrics: str | None) -> Simulated:
    from hycluster.simulate.calibrate import fit_metrics, fit_run

    return fit_run(model) if metrics is None else fit_metrics(model, metrics)


def _say_fit(model: Model, fitted: Simulated, as_json: bool, alone: bool) -> None:
    """What to put into the settings, so that it need not be measured again."""
    said: dict[str, Any] = fitted.model_dump(exclude_defaults=False)
    if as_json:
        if alone:
            echo(json.dumps({"simulated": said}, indent=2))
        return
    echo(f"# models: {model.name}:\nsimulated:", err=not alone)
    for key, value in said.items():
        echo(f"  {key}: {json.dumps(value)}", err=not alone)
