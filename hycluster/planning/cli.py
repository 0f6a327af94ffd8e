"""``hycluster plan``: what it takes to serve a model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hycluster.errors import SettingsError
from hycluster.terminal import console, echo

PRECISIONS = "bfloat16|float16|float32|fp8|int8|int4|mxfp4|nvfp4"


def plan(
    config: Annotated[Path, typer.Argument(metavar="MODEL_CONFIG", help="A model's config.json, or its folder.")],
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="GPU: H20, H100, H200, A100-80GB, L4, ...; an unknown name lists all.")
    ],
    context_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt and output tokens of a sequence; default: the model's context length."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=10_000_000, help="Sequences at a time.")] = 1,
    weights: Annotated[
        str | None, typer.Option(metavar=PRECISIONS, help="Data type of the weights; default: as the checkpoint's.")
    ] = None,
    kv: Annotated[str, typer.Option(metavar="auto|fp8|...", help="Data type of the KV cache.")] = "auto",
    tensor: Annotated[
        int | None, typer.Option(min=1, help="Only layouts with this many tensor-parallel ranks.")
    ] = None,
    pipeline: Annotated[int | None, typer.Option(min=1, help="Only layouts with this many pipeline stages.")] = None,
    data: Annotated[int | None, typer.Option(min=1, help="Only layouts with this many data-parallel ranks.")] = None,
    expert: Annotated[
        bool | None, typer.Option("--expert/--no-expert", help="Only layouts with expert parallel, or only without.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, max=1024, help="GPUs of a node; default: as such nodes usually have.")
    ] = None,
    max_gpus: Annotated[int, typer.Option(min=1, max=4096, help="Most GPUs for one replica.")] = 64,
    utilization: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory-utilization",
            min=0.1,
            max=1,
            help="Fraction of a GPU's memory for vLLM (gpu_memory_utilization); default: 0.9.",
        ),
    ] = None,
    reserve_gib: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of that for activations, CUDA graphs and communication; default: 4."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write settings for `hycluster serve`: deployments/x.yaml.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --write: the model's name for callers.")] = None,
    source: Annotated[str | None, typer.Option(help="With --write: where its weights will be.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --write: replace the file.")] = False,
) -> None:
    """Work out what it takes to serve a model: weights, KV cache, layouts, GPUs, bounds on speed.

    Arithmetic on the configuration; nothing is loaded, no GPU is needed. docs/planning.md tells what is counted.
    """
    from hycluster.planning.families import architecture, read_config
    from hycluster.planning.gpus import gpu as gpu_named
    from hycluster.planning.layouts import Pinned, Workload
    from hycluster.planning.plan import as_json as plan_json
    from hycluster.planning.plan import make_plan
    from hycluster.planning.precision import precision_of
    from hycluster.planning.shares import RESERVE_GIB, UTILIZATION

    for option, value in (("--name", name), ("--source", source), ("--overwrite", overwrite or None)):
        if write is None and value is not None:
            raise SettingsError(f"{option}: is for the file that --write makes; give --write too, or leave it out")
    chosen, said = gpu_named(gpu), read_config(config)
    positions = architecture(said).positions
    if context_tokens is None and not positions:
        raise SettingsError("max_position_embeddings: is not in this configuration; say --context-tokens")
    demand = Workload(
        context_tokens=context_tokens or positions,
        concurrency=concurrency,
        utilization=UTILIZATION if utilization is None else utilization,
        reserve_gib=RESERVE_GIB if reserve_gib is None else reserve_gib,
        per_node=gpus_per_node or chosen.per_node,
        most_gpus=max_gpus,
    )
    made = make_plan(said, precision_of(said, weights, kv), chosen, demand, Pinned(tensor, pipeline, data, expert))
    if write is not None:
        from hycluster.planning.write import settings_text
        from hycluster.planning.write import write_settings_file as write_file

        command = shlex.join(["hycluster", "plan", str(config), "--gpu", chosen.name])
        command += f" --context-tokens {demand.context_tokens} --concurrency {concurrency}"
        text = settings_text(made, name or _name(config, made.model.kind), source or _source(config), command)
        write_file(write, text, overwrite)
    if as_json:
        echo(json.dumps(plan_json(made), indent=2))
        return
    from hycluster.planning.report import show_plan

    show_plan(made, console())
    if write is not None:
        echo(f"written: {write}")


def _folder(config: Path) -> Path | None:
    """The model's folder, if MODEL_CONFIG is one or lies in one."""
    if config.is_dir():
        return config.resolve()
    return config.resolve().parent if config.name == "config.json" else None


def _name(config: Path, kind: str) -> str:
    folder = _folder(config)
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name if folder is not None else config.stem).strip("-._")
    return found.lower().replace("_", "-") or kind


def _source(config: Path) -> str:
    folder = _folder(config)
    return str(folder) if folder is not None else f"/models/{config.stem}"
