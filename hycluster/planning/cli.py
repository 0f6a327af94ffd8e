"""``hycluster plan``: what it takes to serve a model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from hycluster.errors import SettingsError
from hycluster.terminal import console, echo

PRECISIONS = "bfloat16|float16|float32|fp8|int8|int4|mxfp4|nvfp4"


def plan(
    config: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_CONFIG",
            help="A model's config.json, its folder or its hub id (org/name); or a deployment, deployments/x.yaml.",
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GPU: H20, H100, H200, A100-80GB, L4, ...; an unknown name lists all. Default: the deployment's, or"
            " this machine's.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With a deployment of several models: which one.")
    ] = None,
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
    from hycluster.planning.deployment import what_to_plan
    from hycluster.planning.families import architecture
    from hycluster.planning.layouts import Pinned, Workload
    from hycluster.planning.plan import as_json as plan_json
    from hycluster.planning.plan import make_plan
    from hycluster.planning.precision import precision_of
    from hycluster.planning.shares import RESERVE_GIB, UTILIZATION

    for option, value in (("--name", name), ("--source", source), ("--overwrite", overwrite or None)):
        if write is None and value is not None:
            raise SettingsError(f"{option}: is for the file that --write makes; give --write too, or leave it out")
    asked = what_to_plan(config, model, gpu)
    chosen, said = asked.gpu, asked.config
    context_tokens = context_tokens or asked.context_tokens
    weights, kv = weights or asked.weights, asked.kv if kv == "auto" else kv
    positions = architecture(said).positions
    if context_tokens is None and not positions:
        raise SettingsError("max_position_embeddings: is not in this configuration; say --context-tokens")
    demand = Workload(
        context_tokens=context_tokens or positions,
        concurrency=concurrency,
        utilization=utilization or asked.utilization or UTILIZATION,
        reserve_gib=RESERVE_GIB if reserve_gib is None else reserve_gib,
        per_node=gpus_per_node or asked.per_node,
        most_gpus=max_gpus,
    )
    layout = (tensor, pipeline, data, expert)
    pinned = asked.pinned if all(part is None for part in layout) else Pinned(*layout)
    made = make_plan(said, precision_of(said, weights, kv), chosen, demand, pinned)
    if write is not None:
        from hycluster.planning.write import settings_text
        from hycluster.planning.write import write_settings_file as write_file

        command = shlex.join(["hycluster", "plan", config, "--gpu", chosen.name])
        command += f" --context-tokens {demand.context_tokens} --concurrency {concurrency}"
        text = settings_text(made, name or asked.name or made.model.kind, source or asked.source, command)
        write_file(write, text, overwrite)
    if as_json:
        echo(json.dumps(plan_json(made), indent=2))
        return
    from hycluster.planning.report import show_plan

    show_plan(made, console())
    if write is not None:
        echo(f"written: {write}")
