"""From a model's settings to vLLM's engine arguments and the environment of its process.

Imports no vLLM, so that a deployment can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import glob
import importlib.util
import math
from pathlib import Path
from typing import Any

from hycluster.config import Model, home
from hycluster.engine.weights import prepare
from hycluster.errors import SettingsError

GIB = 1 << 30

# What the settings say in words of their own; giving it twice would leave open which one counts.
_OWNED = {
    "model": "source",
    "served_model_name": "name",
    "tensor_parallel_size": "parallel.tensor",
    "pipeline_parallel_size": "parallel.pipeline",
    "data_parallel_size": "parallel.data",
    "enable_expert_parallel": "parallel.expert",
}


def engine_arguments(model: Model, model_path: str) -> dict[str, Any]:
    """Keyword arguments for vLLM's ``AsyncEngineArgs``.

    Raises:
        SettingsError: an engine argument that has a place of its own in the settings.
    """
    for argument, setting in _OWNED.items():
        if argument in model.engine:
            raise SettingsError(f"models: {model.name}: engine.{argument}: is set by {setting!r}; remove it here")
    if model.parallel.data != 1:
        raise SettingsError(
            f"models: {model.name}: parallel.data: {model.parallel.data} is not allowed; must be 1 for now"
            " (take more replicas: they share nothing)"
        )
    arguments: dict[str, Any] = {
        "model": model_path,
        "served_model_name": [model.name],
        "tensor_parallel_size": model.parallel.tensor,
        "pipeline_parallel_size": model.parallel.pipeline,
        "data_parallel_size": model.parallel.data,
        "enable_expert_parallel": model.parallel.expert,
        # Online before batch; within a priority first come, first served, as without it.
        "scheduling_policy": "priority",
    }
    if model.hardware.accelerator is None:
        # bfloat16 crawls on AVX2, and compiling pays back only after hours on a CPU.
        arguments |= {
            "dtype": "float32",
            "enforce_eager": True,
            "distributed_executor_backend": "uni" if model.parallel.devices == 1 else "mp",
            "kv_cache_memory_bytes": int(model.hardware.kv_cache_gib * GIB),
        }
    return arguments | model.engine


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
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
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
