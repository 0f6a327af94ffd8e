"""Rotary position embedding as Tencent's code computes it, on vLLM's kernels.

vLLM's own ``get_rope`` has the scaling with ``alpha``; it lacks the bfloat16 frequencies of the unscaled one.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from hycluster.models.configuration import Rope


class Bfloat16FrequencyRotaryEmbedding(RotaryEmbedding):
    """RoPE whose inverse frequencies are rounded to bfloat16 before the angles are taken in float32.

    At position 100 000 the rounding turns the fastest pairs by whole circles: it is part of the trained model.
    """

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return super()._compute_inv_freq(base).bfloat16().float()


def rotary_embedding(rope: Rope, head_size: int, max_position: int) -> RotaryEmbedding:
    """One rotary embedding for all layers of a model.

    Args:
        head_size: channels a head; all of them are rotated, halves against halves.
        max_position: positions to hold sines and cosines for.
    """
    if rope.alpha is not None:
        parameters = {"rope_type": "dynamic", "rope_theta": rope.theta, "alpha": rope.alpha}
    elif not rope.bfloat16_frequencies:
        parameters = {"rope_type": "default", "rope_theta": rope.theta}
    else:
        return Bfloat16FrequencyRotaryEmbedding(
            head_size, head_size, max_position, rope.theta, is_neox_style=True, dtype=torch.get_default_dtype()
        )
    return get_rope(head_size, max_position=max_position, is_neox_style=True, rope_parameters=parameters)
