"""The parameters of checkpoints as vLLM's loader leaves them; run as a script: a folder, then checkpoint folders.

Writes ``FOLDER/NAME.safetensors`` for each checkpoint. Nothing is computed: vLLM's CPU backend loads FP8, and has no
kernels for it.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    import torch
    from safetensors.torch import save_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    folder, *models = map(Path, sys.argv[1:])
    for model in models:
        config = EngineArgs(model=str(model), dtype="bfloat16", max_model_len=256).create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
                initialize_model_parallel()
            loaded = initialize_model(config)
            get_model_loader(config.load_config).load_weights(loaded, config.model_config)
        save_file(
            {name: tensor.detach().clone() for name, tensor in loaded.named_parameters()},
            folder / f"{model.name}.safetensors",
        )


if __name__ == "__main__":
    main()
