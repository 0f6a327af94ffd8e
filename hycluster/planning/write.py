"""A plan as a settings file that ``hycluster serve`` takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from hycluster.errors import SettingsError
from hycluster.planning.architecture import GIB
from hycluster.planning.layouts import describe
from hycluster.planning.plan import Plan
from hycluster.planning.report import billions, kib, tokens
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings

# What vLLM schedules at a time unless it is told otherwise; short sequences are many more than full ones.
MAX_NUM_SEQS = 256
MAX_REQUESTS = 1024


class IndentedDumper(yaml.SafeDumper):
    """Lists indented below their key, as in the other settings files."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def settings_text(plan: Plan, name: str, source: str, command: str) -> str:
    """The file's text.

    Args:
        name: of the model, for callers.
        source: where its weights are.
        command: that made it, for its head.

    Raises:
        SettingsError: the name or the source is none that settings take.
    """
    settings = _settings(plan, name, source)
    validate(Settings, settings, "--write")
    body = yaml.dump(settings, Dumper=IndentedDumper, sort_keys=False, allow_unicode=True, width=100)
    return "".join(f"# {line}".rstrip() + "\n" for line in _head(plan, command)) + body


def write_settings_file(path: Path, text: str, overwrite: bool, option: str = "--write") -> None:
    """Write the file.

    Args:
        option: the one that named it, for errors.

    Raises:
        SettingsError: it is there already, or can't be written.
    """
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        remedy = "--overwrite replaces it" if option == "--write" else "remove it, or name another"
        raise SettingsError(f"{option}: {path} is there already; {remedy}") from None
    except OSError as error:
        raise SettingsError(f"{option}: {path}: can't be written: {error.strerror}") from error


def _settings(plan: Plan, name: str, source: str) -> dict[str, Any]:
    chosen, precision, parallel = plan.chosen, plan.precision, plan.chosen.parallel
    each = math.ceil(plan.demand.concurrency / chosen.replicas / parallel.data)
    engine: dict[str, Any] = {"dtype": precision.kept}
    if precision.kv != precision.kept:
        engine["kv_cache_dtype"] = precision.kv
    engine |= {
        "max_model_len": plan.demand.context_tokens,
        "max_num_seqs": max(MAX_NUM_SEQS, each),
        "gpu_memory_utilization": plan.demand.utilization,
    }
    cut = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": parallel.data}
    hardware: dict[str, Any] = {
        "accelerator": plan.gpu.accelerator,
        "cpus": max(4, 2 * parallel.devices_per_rank),
    }
    if plan.demand.per_node != 8:
        hardware["gpus_per_node"] = plan.demand.per_node
    model: dict[str, Any] = {"name": name, "source": source, "engine": engine}
    model["parallel"] = {key: size for key, size in cut.items() if size > 1 or key == "tensor"}
    if parallel.expert:
        model["parallel"]["expert"] = True
    model |= {"hardware": hardware, "replicas": {"min": chosen.replicas}}
    if plan.model.kind.startswith("hunyuan") and plan.model.experts:
        model["routing"] = {"expert_metrics": True}
    settings: dict[str, Any] = {"models": [model], "http": {"host": "0.0.0.0"}, "grpc": {"host": "0.0.0.0"}}
    # Nobody knows yet who is to be let in.
    settings["auth"] = {"open": True}
    if plan.demand.concurrency > MAX_REQUESTS:
        settings["admission"] = {"max_requests": plan.demand.concurrency}
    # Reading and placing weights takes minutes; a long answer takes as long.
    return settings | {"start_timeout_s": 3600, "drain_timeout_s": 300}


def _head(plan: Plan, command: str) -> list[str]:
    chosen, demand, share = plan.chosen, plan.demand, plan.chosen.share
    lines = [
        (
            f"{plan.model.kind}, {billions(plan.counted.total)} parameters, in {plan.precision.weights} on"
            f" {chosen.gpus} {plan.gpu.name}: {describe(chosen.parallel)}"
        ),
        "",
        f"By `{command}`:",
        f"  weights: {share.weights_bytes / GIB:.1f} GiB a GPU",
        f"  KV cache: {kib(share.kv_bytes_per_token)} a token and GPU, {kib(plan.kv_bytes_per_token)} a token in all",
        (
            f"  room: {tokens(chosen.free_bytes // share.kv_bytes_per_token)} a data-parallel rank, at"
            f" gpu_memory_utilization {demand.utilization:g} with {demand.reserve_gib:g} GiB set aside for activations"
        ),
        f"  sequences of {demand.context_tokens} tokens: {chosen.sequences} at a time a replica",
        f"  decode, at most: {plan.full.tokens_per_s:,.0f} tokens/s a replica, by {plan.full.limit}",
    ]
    if not plan.precision.stored:
        lines += [
            f"The configuration that was planned with is not in {plan.precision.weights}: `source` must be a",
            "checkpoint that is, or engine.quantization must have vLLM make it so.",
        ]
    return lines
