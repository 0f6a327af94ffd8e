"""A request without an adapter, beside requests with one, on CPU.

What: what an adapter would add to a token that has none is zero.
Why: a token of a request without an adapter has the adapter index -1. vLLM's kernels for GPUs skip those; its CPU
operations index with them, and take the adapter in the last slot: a base model's answer then changes with what else
runs.
Upstream: vllm-project/vllm#48421 and vllm-project/vllm#49656, both open.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_cpu_lora.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class PunicaWrapper(PunicaWrapperCPU):
    """vLLM's wrapper; what an adapter would add to tokens that have none is zero."""

    def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._apply_shrink(y, x, w_t_all, scale)
        _silence(y, self.token_lora_indices)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        _silence(x, self.token_lora_indices)
        super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        # A row of zeros has no logits to add.
        x = torch.where(self.sampler_indices.unsqueeze(-1) < 0, 0, x.view(-1, x.shape[-1]))
        super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)


def _silence(rows: torch.Tensor, adapters: torch.Tensor) -> None:
    """Set to zero the rows whose token has no adapter."""
    rows.view(-1, rows.shape[-1])[: len(adapters)][adapters < 0] = 0


def patch_lora() -> None:
    """Put it into vLLM, in this process; more than once does nothing. Does nothing on other platforms than CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.platforms.cpu import CpuPlatform

    name = f"{PunicaWrapper.__module__}.{PunicaWrapper.__qualname__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda _: name)  # type: ignore[method-assign, assignment]
