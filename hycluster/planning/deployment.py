"""What ``hycluster plan`` is asked about: a model's configuration, or a deployment with what it settles."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hycluster.errors import SettingsError, shown
from hycluster.planning.gpus import GPUS, Gpu
from hycluster.planning.gpus import gpu as gpu_named
from hycluster.planning.layouts import Pinned
from hycluster.planning.machine import this_machine
from hycluster.planning.precision import BITS
from hycluster.planning.source import is_hub_id, source_config
from hycluster.settings.model import Model
from hycluster.settings.read import load_settings


@dataclass(frozen=True, slots=True)
class Asked:
    """A question to the planner; None where it is open.

    Attributes:
        name: of the model, for callers.
        source: where its weights will be.
        kv: data type of the KV cache, or ``auto``.
        utilization: ``gpu_memory_utilization``.
        pinned: the layout that a deployment has.
    """

    config: dict[str, Any]
    gpu: Gpu
    name: str
    source: str
    per_node: int
    context_tokens: int | None = None
    weights: str | None = None
    kv: str = "auto"
    utilization: float | None = None
    pinned: Pinned = field(default_factory=Pinned)


def what_to_plan(what: str, model: str | None, gpu: str | None) -> Asked:
    """The question behind the argument of ``hycluster plan``.

    Args:
        what: ``config.json``, a folder with one, a hub id, or a deployment's settings file.
        model: which one of a deployment's.
        gpu: a name; None is the deployment's, or this machine's.

    Raises:
        SettingsError: there is no such thing, or no GPU is known.
    """
    if what.endswith((".yaml", ".yml")):
        return _of_deployment(what, model, gpu)
    if model is not None:
        raise SettingsError(f"--model: is for a deployment (.yaml); {shown(what)} is one model")
    config = source_config(what, "MODEL_CONFIG")
    chosen = gpu_named(gpu) if gpu is not None else _gpu_here()
    return Asked(config, chosen, _name(what), _source(what), chosen.per_node)


def _of_deployment(what: str, name: str | None, gpu: str | None) -> Asked:
    settings = load_settings(what)
    if name is None and len(settings.models) > 1:
        raise SettingsError(f"--model: {what} has several; must be one of {[each.name for each in settings.models]}")
    found = settings.models[0] if name is None else settings.model(name)
    where = f"{what}: models: {found.name}"
    accelerator = found.hardware.accelerator
    if accelerator is None and gpu is None:
        raise SettingsError(f"{where}: hardware.accelerator: is not set, it runs on CPU; plans are for GPUs: say --gpu")
    chosen = gpu_named(gpu) if gpu is not None else _by_rays_name(str(accelerator), where)
    engine = found.engine
    quantization = engine.get("quantization")
    return Asked(
        source_config(found.source, f"{where}: source", engine.get("revision")),
        chosen,
        found.name,
        found.source,
        found.hardware.gpus_per_node if accelerator is not None else chosen.per_node,
        context_tokens=engine.get("max_model_len") if isinstance(engine.get("max_model_len"), int) else None,
        weights=quantization if quantization in BITS else None,
        kv="fp8" if str(engine.get("kv_cache_dtype", "")).startswith("fp8") else "auto",
        utilization=engine.get("gpu_memory_utilization"),
        # On another GPU the layout is the question.
        pinned=Pinned() if accelerator is None or gpu is not None else _layout(found),
    )


def _layout(model: Model) -> Pinned:
    parallel = model.parallel
    return Pinned(parallel.tensor, parallel.pipeline, parallel.data, parallel.expert)


def _by_rays_name(accelerator: str, where: str) -> Gpu:
    for gpu in GPUS.values():
        if accelerator in (gpu.accelerator, gpu.name):
            return gpu
    raise SettingsError(f"{where}: hardware.accelerator: {accelerator!r} is not in the planner's table; say --gpu")


def _gpu_here() -> Gpu:
    there = this_machine()
    if there.gpu is None or there.gpu.name not in GPUS:
        raise SettingsError(f"--gpu: must be given, {there} (one that is known); one of {', '.join(GPUS)}")
    return GPUS[there.gpu.name]


def _folder(config: Path) -> Path | None:
    """The model's folder, if it is one or lies in one."""
    if config.is_dir():
        return config.resolve()
    return config.resolve().parent if config.name == "config.json" else None


def _name(what: str) -> str:
    if is_hub_id(what):
        return what
    config = Path(what).expanduser()
    folder = _folder(config)
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name if folder is not None else config.stem).strip("-._")
    return found.lower().replace("_", "-")


def _source(what: str) -> str:
    if is_hub_id(what):
        return what
    folder = _folder(Path(what).expanduser())
    return str(folder) if folder is not None else f"/models/{Path(what).stem}"
