"""Settings for a model of which nothing but the source is said: as the planner has it, for the hardware that is there.

What cannot be counted is not guessed at: a kind of model that the planner does not know gets vLLM's own ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hycluster.errors import SettingsError, shown
from hycluster.planning.architecture import GIB, Architecture, parameters
from hycluster.planning.families import FAMILIES, architecture
from hycluster.planning.layouts import Workload, describe, search
from hycluster.planning.machine import Available
from hycluster.planning.plan import total_weights_bytes
from hycluster.planning.precision import Precision, precision_of
from hycluster.planning.report import billions, tokens
from hycluster.planning.shares import kv_bytes_per_token
from hycluster.planning.write import IndentedDumper

LOOPBACK = "127.0.0.1"
ANYWHERE = "0.0.0.0"
# On a CPU a longer prompt takes minutes.
CPU_CONTEXT_TOKENS = 4096
CPU_SEQUENCES = 16
# Ray, the ingress and libraries; the rest of the machine's own.
CPU_RESERVE_GIB = 3.0
# What a machine's memory gives the KV cache at most: files and other programs want some too.
CPU_KV_SHARE = 0.25
# Of the KV cache's size, steps.
KV_STEP_GIB = 0.25
LEAST_CONTEXT_TOKENS = 512
FLOAT32 = Precision("float32", kept="float32", kv="float32")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Settings, and why they are so.

    Attributes:
        reasons: a line each.
    """

    settings: dict[str, Any]
    reasons: tuple[str, ...]

    def text(self, command: str) -> str:
        """A settings file."""
        head = [f"By `{command}`:", *(f"  {reason}" for reason in self.reasons)]
        body = yaml.dump(self.settings, Dumper=IndentedDumper, sort_keys=False, allow_unicode=True, width=100)
        return "".join(f"# {line}\n" for line in head) + body


def suggest(source: str, config: Mapping[str, Any], hardware: Available) -> Suggestion:
    """Settings for ``hycluster serve``.

    Args:
        source: a folder or a hub id.
        config: its ``config.json``.

    Raises:
        SettingsError: the model does not fit what is there; says by how much.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        model, reasons = _uncounted(config, hardware)
    elif hardware.gpu is None:
        model, reasons = _on_cpu(architecture(config), hardware)
    else:
        model, reasons = _on_gpus(architecture(config), precision_of(config), hardware)
    # On a cluster nobody knows on which machine an ingress process will be.
    listen = {"host": LOOPBACK if hardware.alone else ANYWHERE}
    settings: dict[str, Any] = {"models": [{"name": callers_name(source), "source": source} | model]}
    settings |= {"http": listen | {"port": 8000}, "grpc": listen | {"port": 9000}}
    if not hardware.alone:
        settings["auth"] = {"open": True}
    if hardware.gpu is not None:
        settings |= {"start_timeout_s": 3600, "drain_timeout_s": 300}
    return Suggestion(settings, (str(hardware), *reasons))


def callers_name(source: str) -> str:
    """What callers put into ``model``: the hub id as it stands, as with vLLM's own server, or the folder's name."""
    path = Path(source).expanduser()
    name = path.resolve().name if path.is_dir() else source
    return re.sub(r"[^A-Za-z0-9._/:-]+", "-", name).lstrip("-._/:") or "model"


def _on_gpus(model: Architecture, precision: Precision, there: Available) -> tuple[dict[str, Any], list[str]]:
    assert there.gpu is not None
    context = longest = model.positions or 32768
    while True:
        demand = Workload(context, 1, per_node=there.gpus_per_node, most_gpus=there.gpus)
        try:
            chosen = search(model, precision, there.gpu, demand).fits[0]
            break
        except SettingsError:
            # A shorter context may do.
            if context // 2 < LEAST_CONTEXT_TOKENS:
                raise
            context //= 2
    parallel, devices = chosen.parallel, chosen.parallel.devices
    count = max(1, there.gpus // devices)
    reasons = [
        (
            f"{model.kind}, {billions(parameters(model).total)} parameters in {precision.weights}:"
            f" {chosen.share.weights_bytes / GIB:.1f} GiB a GPU; a replica is {describe(parallel)}, {count} of them"
        ),
        f"room for {tokens(chosen.free_bytes // chosen.share.kv_bytes_per_token)} of KV cache a replica",
    ]
    if context < longest:
        reasons.append(f"max_model_len {context}: of the model's {longest} tokens no more fit")
    cut: dict[str, Any] = {
        name: size
        for name, size in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("data", parallel.data))
        if size > 1
    }
    if parallel.expert and devices > 1:
        cut["expert"] = True
    engine: dict[str, Any] = {"dtype": precision.kept, "max_model_len": context}
    each = parallel.devices_per_rank
    # At most its GPUs' part of the node's.
    hardware: dict[str, Any] = {
        "accelerator": there.accelerator,
        "cpus": max(1, min(4 * each, there.cpus * each // there.gpus_per_node)),
    }
    if there.gpus_per_node != 8:
        hardware["gpus_per_node"] = there.gpus_per_node
    return {
        "engine": engine,
        **({"parallel": cut} if cut else {}),
        "hardware": hardware,
        "replicas": {"min": count},
    }, reasons


def _on_cpu(model: Architecture, there: Available) -> tuple[dict[str, Any], list[str]]:
    weights_gib = total_weights_bytes(parameters(model), FLOAT32) / GIB
    per_token = kv_bytes_per_token(model, "float32")
    room_gib = there.free_gib - weights_gib - CPU_RESERVE_GIB
    context = longest = min(model.positions or CPU_CONTEXT_TOKENS, CPU_CONTEXT_TOKENS)
    while context * per_token / GIB > room_gib and context // 2 >= LEAST_CONTEXT_TOKENS:
        context //= 2
    if context * per_token / GIB > room_gib:
        raise SettingsError(
            f"memory: the weights ({billions(parameters(model).total)} parameters) take {weights_gib:.1f} GiB in"
            f" float32, all else {CPU_RESERVE_GIB:g} GiB; {there}: take a smaller model, or a machine with a GPU"
        )
    one_gib = context * per_token / GIB
    wanted_gib = min(CPU_SEQUENCES * one_gib, room_gib * CPU_KV_SHARE)
    least_gib = max(math.ceil(100 * one_gib) / 100, min(KV_STEP_GIB, room_gib))
    kv_gib = max(int(wanted_gib / KV_STEP_GIB) * KV_STEP_GIB, least_gib)
    reasons = [
        (
            f"{model.kind}, {billions(parameters(model).total)} parameters: {weights_gib:.1f} GiB in float32, which is"
            " what CPUs are fast with"
        ),
        f"{kv_gib:.2f} GiB of KV cache: {tokens(int(kv_gib * GIB / per_token))}",
    ]
    if model.positions > context:
        why = "a longer prompt takes minutes on a CPU" if context == longest else "no more fit into memory"
        reasons.append(f"max_model_len {context} of the model's {model.positions}: {why}")
    return {
        "engine": {"max_model_len": context, "max_num_seqs": 4 * CPU_SEQUENCES},
        "hardware": {"cpus": _spare(there), "kv_cache_gib": kv_gib},
        "replicas": {"min": 1},
    }, reasons


def _uncounted(config: Mapping[str, Any], there: Available) -> tuple[dict[str, Any], list[str]]:
    """vLLM finds out by itself whether it fits."""
    reasons = [
        f"model_type {shown(config.get('model_type'))} is unknown to the planner; whether it fits, its start shows"
    ]
    if there.gpu is not None:
        # One GPU; who needs more says parallel.tensor.
        return {"hardware": {"accelerator": there.accelerator}, "replicas": {"min": 1}}, reasons
    text = config.get("text_config")
    said = config.get("max_position_embeddings") or (isinstance(text, Mapping) and text.get("max_position_embeddings"))
    engine = {"max_model_len": min(said, CPU_CONTEXT_TOKENS)} if isinstance(said, int) and said > 1 else {}
    kv_gib = max(1.0, int(there.free_gib * CPU_KV_SHARE / 2))
    hardware = {"cpus": _spare(there), "kv_cache_gib": kv_gib}
    return {"engine": engine, "hardware": hardware, "replicas": {"min": 1}}, reasons


def _spare(there: Available) -> int:
    """One is left for the ingress and what else there is."""
    return max(1, there.cpus - 1)
