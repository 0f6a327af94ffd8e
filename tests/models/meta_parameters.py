"""A process of its own: build hycluster's model for each ``config.json`` without allocating it, print its parameters.

    python -m tests.models.meta_parameters FOLDER...

vLLM's layers need its distributed environment, which a test's process would keep.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs

from hycluster.models.plugin import register


def parameters_of(folder: str) -> int:
    """Each parameter once, however many names it has."""
    arguments = EngineArgs(model=folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=128)
    with set_current_vllm_config(arguments.create_engine_config()):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{Path(folder).resolve() / 'store'}", 0, "gloo")
            initialize_model_parallel(1, 1)
        from hycluster.models.hunyuan import HunyuanForCausalLM

        with torch.device("meta"):
            model = HunyuanForCausalLM(vllm_config=get_current_vllm_config())  # type: ignore[abstract]  # as vLLM does
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    register()
    torch.set_default_dtype(torch.bfloat16)
    print(*map(parameters_of, sys.argv[1:]))
