"""From a model's settings to vLLM's engine arguments and the environment of its process.

Imports no vLLM, so that a deployment can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import glob
import importlib.util
import math
from pathlib import Path
from typing import Any

from hycluster import logs
from hycluster.adapters import adapter_arguments
from hycluster.engine.protocol import GroupRank
from hycluster.engine.weights import prepare
from hycluster.errors import SettingsError
from hycluster.settings.base import home
from hycluster.settings.model import Model, Routing

GIB = 1 << 30

# What the settings say in words of their own; giving it twice would leave open which one counts.
_OWNED = {
    "model": "source",
    "served_model_name": "name",
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "data_parallel_size": "parallel.data",
    "data_parallel_rank": "parallel.data",
    "enable_expert_parallel": "parallel.expert",
    "enable_eplb": "parallel.eplb",
    "eplb_config": "parallel.eplb",
    "kv_offloading_size": "hardware.kv_offload_gib",
}


# vLLM 0.32.0's CPU build has no FP8 kernels for these: static_scaled_fp8_quant, dynamic_per_token_scaled_fp8_quant.
_QUANTIZATIONS_OF_GPUS = {"fp8", "fp8_per_tensor", "fp8_per_channel"}


def engine_arguments(model: Model, model_path: str, place: GroupRank | None = None) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``AsyncEngineArgs``.

    Args:
        place: where in its data-parallel group the engine stands; None for one that runs by itself, and for a
            gateway, which has no part in a group.

    Raises:
        SettingsError: an engine argument that has a place of its own in the settings, or one that vLLM can't do here.
    """
    for argument, setting in _OWNED.items():
        if argument in model.engine:
            raise SettingsError(f"models: {model.name}: engine.{argument}: is set by {setting!r}; remove it here")
    arguments: dict[str, Any] = {
        "model": model_path,
        "served_model_name": [model.name],
        "tensor_parallel_size": model.parallel.tensor,
        "pipeline_parallel_size": model.parallel.pipeline,
        "enable_expert_parallel": model.parallel.expert,
        "distributed_executor_backend": executor(model),
        # Online before batch; within a priority first come, first served, as without it.
        "scheduling_policy": "priority",
    }
    if place is not None:
        arguments |= {
            "data_parallel_size": place.size,
            "data_parallel_rank": place.rank,
            "data_parallel_address": place.host,
        }
    if model.hardware.accelerator is None:
        # bfloat16 crawls on AVX2, and compiling pays back only after hours on a CPU.
        arguments |= {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(model.hardware.kv_cache_gib * GIB),
        }
        if model.parallel.pipeline > 1:
            arguments["worker_cls"] = "hycluster.engine.patches.cpu_pipeline.PipelineWorker"
    arguments |= _eplb(model, place)
    # An output whose form is given begins behind the reasoning, and who knows where that ends is the engine.
    parsers = {name: model.api[name] for name in ("reasoning_parser", "reasoning_parser_plugin") if name in model.api}
    return arguments | parsers | adapter_arguments(model) | _kv_offload(model) | model.engine | _routing(model)


def executor(model: Model) -> str:
    """How the ranks of one engine run, vLLM's name: in the engine's process, in processes below it, or in Ray actors.

    Processes stay on the engine's node, so a rank that does not fit one node takes Ray actors, a GPU each.
    """
    if "distributed_executor_backend" in model.engine:
        return str(model.engine["distributed_executor_backend"])
    if model.parallel.devices_per_rank == 1:
        return "uni"
    on_gpus = model.hardware.accelerator is not None
    return "ray" if on_gpus and model.parallel.devices_per_rank > model.hardware.gpus_per_node else "mp"


def _eplb(model: Model, place: GroupRank | None) -> dict[str, Any]:
    """Expert parallel load balancing, for an engine that takes part in it.

    Raises:
        SettingsError: it is asked for on CPU.
    """
    settings = model.parallel.eplb
    if not settings.enabled:
        return {}
    if model.hardware.accelerator is None:
        raise SettingsError(
            f"models: {model.name}: parallel.eplb.enabled: true is not allowed on CPU; vLLM balances experts on GPUs"
        )
    if model.parallel.data > 1 and place is None:
        return {}
    balancer = {
        "num_redundant_experts": settings.redundant_experts,
        "window_size": settings.window_size,
        "step_interval": settings.step_interval,
    }
    return {"enable_eplb": True, "eplb_config": balancer}


def _routing(model: Model) -> dict[str, Any]:
    """Where hycluster's models look for the routing settings; also how a bare ``vllm serve`` is told of them."""
    given = model.engine.get("additional_config") or {}
    if "hycluster" in given:
        raise SettingsError(
            f"models: {model.name}: engine.additional_config.hycluster: is set by 'routing'; remove it here"
        )
    if model.routing == Routing():
        return {}
    return {"additional_config": given | {"hycluster": {"routing": model.routing.model_dump(exclude_none=True)}}}


def check_platform(model: Model, quantization: str | None) -> None:
    """Refuse what vLLM's CPU build would load for minutes, and then end for want of a kernel.

    Args:
        quantization: vLLM's name of the one that it found in the settings or in the checkpoint.

    Raises:
        SettingsError: names the argument; docs/engine-features.md says what there is on CPU.
    """
    if model.hardware.accelerator is not None or model.simulated is not None:
        return
    for wanted in (model.engine.get("quantization"), quantization):
        if wanted in _QUANTIZATIONS_OF_GPUS:
            raise SettingsError(f"models: {model.name}: engine.quantization: {wanted!r} needs a GPU")
    speculative = model.engine.get("speculative_config")
    if isinstance(speculative, dict) and speculative.get("method") == "ngram_gpu":
        raise SettingsError(
            f"models: {model.name}: engine.speculative_config.method: 'ngram_gpu' needs a GPU; on CPU take 'ngram'"
        )


def _kv_offload(model: Model) -> dict[str, Any]:
    """Have vLLM keep dropped KV blocks in host memory.

    Raises:
        SettingsError: an engine argument that leaves the store without effect.
    """
    if model.hardware.kv_offload_gib is None:
        return {}
    where = f"models: {model.name}: hardware.kv_offload_gib"
    if "kv_transfer_config" in model.engine:
        raise SettingsError(f"{where}: can't be together with engine.kv_transfer_config; give one of the two")
    if model.engine.get("enable_prefix_caching", True) is False:
        raise SettingsError(f"{where}: needs prefix caching; remove engine.enable_prefix_caching")
    store: dict[str, Any] = {"cpu_bytes_to_use": int(model.hardware.kv_offload_gib * GIB)}
    if model.hardware.accelerator is None:
        store |= {"spec_name": "HostOffloadingSpec", "spec_module_path": "hycluster.engine.patches.kv_offload"}
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": store}
    return {"kv_transfer_config": connector, "enable_prefix_caching": True}


def model_files(model: Model) -> str:
    """The folder (or hub id) that vLLM loads this model from, prepared if need be.

    Raises:
        SettingsError: ``source`` names no model.
    """
    return str(
        prepare(
            model.source,
            home(),
            needs_weights=model.simulated is None and model.engine.get("load_format") != "dummy",
            needs_tokenizer="tokenizer" not in model.engine and not model.engine.get("skip_tokenizer_init"),
        )
    )


def engine_environment(model: Model) -> dict[str, str]:
    """Environment of a process that holds this model's engine.

    On CPU the libraries that vLLM preloads into worker processes that it starts itself are preloaded here, since
    the engine lives in the replica's own process (vllm/platforms/cpu.py, 0.32.0).
    """
    environment = {
        **logs.ENVIRONMENT,
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if model.hardware.accelerator is None and model.simulated is None:
        threads = str(max(1, math.floor(model.hardware.cpus)))
        environment |= {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if preload := _preloads():
            environment["LD_PRELOAD"] = ":".join(preload)
    return environment


def _preloads() -> list[str]:
    """vLLM's tcmalloc and torch's OpenMP, where they are installed."""
    found: list[str] = []
    for package, patterns in (
        ("vllm", ["libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*"]),
        ("torch", ["../torch.libs/libgomp*.so*", "lib/libgomp*.so*"]),
    ):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            hits = [hit for pattern in patterns for hit in sorted(glob.glob(str(Path(location) / pattern)))]
            if hits:
                found.append(str(Path(hits[0]).resolve()))
                break
    return found
