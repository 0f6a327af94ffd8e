"""A process of its own (tests/vllm_forks.py): what vLLM holds of a model on CPU, printed as a line of JSON.

    python -m tests.planning.allocated ENGINES FOLDER...

Each folder has a tiny ``config.json``; weights are dummies. Out, for each folder:

- ``ranks``: with expert parallel and without, the bytes of weights and of KV cache a token on the first of two tensor
  ranks, of models that are built and not run;
- ``engine``: for the first ENGINES folders, the blocks that a running engine's KV cache was divided into, and their
  size. Its weights are not told: vLLM packs them for the CPU's kernels, out of sight.

vLLM's layers need its distributed environment, which a test's process would keep. The further ranks are forks, which
cost no import of their own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model

from hycluster.planning.architecture import Architecture
from hycluster.planning.families import architecture

KV_CACHE_BYTES = 1 << 24
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "load_format": "dummy",
    "enforce_eager": True,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
}
TENSOR = 2


def weights_bytes(model: torch.nn.Module) -> int:
    """Each parameter once, however many names it has."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def built(folder: str, expert: bool) -> dict[str, int]:
    """A rank's share of a model that is built; nothing is loaded into it."""
    arguments = EngineArgs(model=folder, enable_expert_parallel=expert, **COMMON)
    config = arguments.create_engine_config()
    config.parallel_config.tensor_parallel_size = TENSOR
    config.parallel_config.world_size = TENSOR
    with set_current_vllm_config(config):
        model = initialize_model(config)
        kv_bytes = 0.0
        for layer in config.compilation_config.static_forward_context.values():
            # One that reads another's cache has none.
            if getattr(layer, "kv_sharing_target_layer_name", None) is None and hasattr(layer, "get_kv_cache_spec"):
                spec = layer.get_kv_cache_spec(config)
                kv_bytes += spec.page_size_bytes / spec.block_size if spec is not None else 0
    return {"weights_bytes": weights_bytes(model), "kv_bytes_per_token": round(kv_bytes)}


def shape(folder: str) -> Architecture:
    return architecture(json.loads((Path(folder) / "config.json").read_text()))


def ways(folder: str) -> tuple[bool, ...]:
    """With expert parallel and without, where there are experts."""
    return (False, True) if shape(folder).experts else (False,)


def ranks(folders: list[str]) -> list[dict[str, dict[str, int]]]:
    """The shares of the first of two ranks, for each folder."""
    with tempfile.TemporaryDirectory() as store:
        other = os.fork()
        rank = 0 if other else 1
        # Ranks that name their shared memory differently do without it: nothing is sent here.
        os.environ["VLLM_DIST_IDENT"] = f"allocated-{os.getpid()}"
        # The groups of a model with experts do for those without.
        config = EngineArgs(model=max(folders, key=ways), **COMMON).create_engine_config()
        config.parallel_config.tensor_parallel_size = TENSOR
        with set_current_vllm_config(config):
            init_distributed_environment(TENSOR, rank, f"file://{store}/store", rank, "gloo")
            initialize_model_parallel(TENSOR, 1)
        told = [{str(expert): built(folder, expert) for expert in ways(folder)} for folder in folders]
        torch.distributed.barrier()
        if not other:
            os._exit(0)
        os.waitpid(other, 0)
        cleanup_dist_env_and_memory()
    return told


def engine(folder: str) -> dict[str, int]:
    """How a running engine has divided its KV cache."""
    # Of the two backends for latent attention the one that takes float32.
    backend: dict[str, Any] = {"attention_backend": "CPU_MLA"} if shape(folder).latent else {}
    llm = LLM(model=folder, distributed_executor_backend="uni", **COMMON, **backend)
    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks is not None
    return {"blocks": cache.num_gpu_blocks, "block_tokens": cache.block_size}


def import_models(folders: list[str]) -> None:
    """vLLM looks at a model that it has not imported in a process of its own, ten seconds for each."""
    for folder in folders:
        for name in json.loads((Path(folder) / "config.json").read_text())["architectures"]:
            lazy: Any = ModelRegistry.models[name]
            ModelRegistry.register_model(name, lazy.load_model_cls())


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from hycluster.models.plugin import register

    register()
    engines, paths = int(sys.argv[1]), sys.argv[2:]
    import_models(paths)
    told: list[dict[str, Any]] = [{"ranks": share} for share in ranks(paths)]
    for path, of in zip(paths[:engines], told, strict=False):
        of["engine"] = engine(path)
    print(json.dumps(told))
