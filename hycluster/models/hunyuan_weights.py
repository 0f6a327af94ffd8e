"""From Tencent's checkpoint layouts to the names that the model in ``hunyuan.py`` loads.

Tencent publishes two layouts of the same weights. The separate one has ``q_proj``, ``k_proj``, ``v_proj`` and
``gate_proj``, ``up_proj``; the fused one has

- ``qkv_proj``, interleaved by KV group: the query heads of a group, its key head, its value head; and
- ``gate_and_up_proj``, up first.

FP8 checkpoints have a ``weight_scale`` and an ``input_scale`` beside each projection, one number each; a fused
projection's scales hold for all of its parts. Here the fused layout becomes the separate one, which vLLM's own
loaders then pack as they like (by tensor-parallel rank, by expert).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hycluster.models.configuration import head_size

Weights = Iterable[tuple[str, torch.Tensor]]

QUERY_NORM, KEY_NORM, FOLDED_NORM = "query_layernorm.weight", "key_layernorm.weight", "q_norm.weight"


def separate(weights: Weights, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Split fused projections; everything else passes through.

    Args:
        weights: names and tensors in either of Tencent's layouts, or mixed.
        config: the checkpoint's configuration.

    Raises:
        ValueError: a fused tensor whose rows don't divide as the configuration says.
    """
    for name, tensor in weights:
        if ".qkv_proj." in name:
            for part, piece in zip("qkv", _split_qkv(name, tensor, config), strict=True):
                yield name.replace(".qkv_proj.", f".{part}_proj."), piece
        elif ".gate_and_up_proj." in name:
            for part, piece in zip(("up", "gate"), _split_halves(name, tensor), strict=True):
                yield name.replace(".gate_and_up_proj.", f".{part}_proj."), piece
        else:
            yield name, tensor


def fold_key_norms(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Fold each layer's key norm weight into its query norm weight.

    A query meets a key in a dot product over the head's channels, so
    ``(w_q * q) . (w_k * k) = (w_q * w_k * q) . k`` exactly. The key that goes into the KV cache then carries no
    weight of its layer, and the layers that share it can each apply their own.

    Args:
        dtype: the model's; products are taken in float32 and rounded once.

    Raises:
        ValueError: a layer with one of the two norms only.
    """
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        for own, other in ((QUERY_NORM, KEY_NORM), (KEY_NORM, QUERY_NORM)):
            if name.endswith(own):
                layer = name.removesuffix(own)
                if (half := halves.pop(layer + other, None)) is None:
                    halves[name] = tensor
                else:
                    yield layer + FOLDED_NORM, (half.float() * tensor.float()).to(dtype)
                break
        else:
            yield name, tensor
    if halves:
        raise ValueError(f"the checkpoint has {sorted(halves)} without the norms that belong to them")


def _split_qkv(name: str, tensor: torch.Tensor, config: Any) -> list[torch.Tensor]:
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, head_size(config)
    rows = (heads + 2 * kv_heads) * size
    if tensor.ndim == 0 or tensor.shape[0] == 1:
        return _scalars(tensor, 3)
    if tensor.shape[0] != rows:
        raise ValueError(f"{name}: has {tensor.shape[0]} rows; the configuration asks for {rows}")
    queries = heads // kv_heads
    groups = tensor.reshape(kv_heads, queries + 2, size, *tensor.shape[1:])
    parts = torch.split(groups, [queries, 1, 1], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _split_halves(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.ndim == 0 or tensor.shape[0] == 1:
        return _scalars(tensor, 2)
    if tensor.shape[0] % 2:
        raise ValueError(f"{name}: has {tensor.shape[0]} rows; must be an even number (up and gate)")
    return list(torch.chunk(tensor, 2, dim=0))


def _scalars(scale: torch.Tensor, parts: int) -> list[torch.Tensor]:
    # vLLM's loaders mark the tensors that they are given; each part needs one of its own.
    return [scale.clone() for _ in range(parts)]
