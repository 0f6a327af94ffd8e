"""Tencent's other ways of writing the same weights: fused projections, and FP8.

The way back is in ``hunyuan_weights.py``. Both functions here take a state dict in the separate layout (``q_proj``,
``k_proj``, ``v_proj``, ``gate_proj``, ``up_proj``) and return a new one.

Sources: the loader of the Hunyuan fork of vLLM that Tencent names (quinnrong94/vllm, branch ``dev_hunyuan``), which
reads the fused layout and FP8 by vLLM's ``fp8`` scheme; and AngelSlim, Tencent's own quantizer, for what stands in
``quantization_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_and_up_proj",
    "down_proj",
)


def to_fused(weights: Mapping[str, Tensor], kv_heads: int) -> dict[str, Tensor]:
    """Fuse q, k, v by KV group (the group's query heads, its key head, its value head), and up with gate.

    A layer that shares another's keys and values has no ``k_proj``; its ``q_proj`` stays alone.
    """
    fused: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".q_proj." in name and name.replace(".q_proj.", ".k_proj.") in weights:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            groups = torch.cat([part.reshape(kv_heads, -1, *part.shape[1:]) for part in parts], dim=1)
            fused[name.replace(".q_proj.", ".qkv_proj.")] = groups.flatten(0, 1)
        elif ".gate_proj." in name:
            parts = [weights[name.replace(".gate_proj.", f".{part}_proj.")] for part in ("up", "gate")]
            fused[name.replace(".gate_proj.", ".gate_and_up_proj.")] = torch.cat(parts)
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[name] = tensor
    return fused


def to_fp8(weights: Mapping[str, Tensor], input_amax: float = 64.0) -> dict[str, Tensor]:
    """Quantize every projection to float8_e4m3fn with one scale for its weight and one for its input.

    ``weight_scale`` and ``input_scale`` are scalars; true value = stored value * scale. Embeddings, norms, biases and
    the router keep their type.

    Args:
        input_amax: largest absolute value that a projection's input is taken to have (no calibration is done).
    """
    quantized: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or not layer.endswith(_PROJECTIONS):
            quantized[name] = tensor
            continue
        scale = tensor.float().abs().max() / FP8_MAX
        quantized[name] = (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        quantized[f"{layer}.weight_scale"] = scale
        quantized[f"{layer}.input_scale"] = torch.tensor(input_amax / FP8_MAX)
    return quantized


def fp8_quantization_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What config.json says of weights that :func:`to_fp8` made."""
    routers = [name.removesuffix(".weight") for name in weights if name.endswith(".gate.wg.weight")]
    return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", *routers]}
