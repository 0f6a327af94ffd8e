"""Random LoRA adapters in PEFT's format, large enough to change every answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

Shapes = Mapping[str, tuple[int, int]]


def write_adapter(folder: Path, shapes: Shapes, *, seed: int, rank: int = 8, alpha: int = 16) -> Path:
    """Write an adapter.

    Args:
        shapes: by the module's path in the checkpoint (``model.layers.0.self_attn.q_proj``), channels in and out.
    """
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (channels_in, channels_out) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, channels_in, generator=random) * 0.3
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(channels_out, rank, generator=random) * 0.3
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in shapes}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def attention_of(layers: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Queries, values and output of a model whose heads add up to its hidden size."""
    return {
        f"model.layers.{layer}.self_attn.{part}": (hidden, hidden)
        for layer in range(layers)
        for part in ("q_proj", "v_proj", "o_proj")
    }
