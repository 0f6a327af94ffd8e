"""LoRA on CPU: what vLLM 0.32.0 lacks for it.

- A token of a request without an adapter has the adapter index -1. vLLM's kernels for GPUs skip those; its CPU
  operations index with them, and take the adapter in the last slot: a base model's answer then changes with what
  else runs. Here they add nothing.
- With LoRA on, vLLM gives a mixture-of-experts layer its Triton kernels, which there are none of on CPU, whether an
  adapter touches experts or not. Here experts take the CPU's kernels and no adapters; one that brings weights for
  them is refused.

``tests/integration/test_vllm_contract.py`` fails once vLLM does one of them itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.utils import get_supported_lora_modules
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


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


def mend() -> None:
    """Put both into vLLM, in this process; more than once does nothing. Does nothing on other platforms than CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora import model_manager
    from vllm.platforms.cpu import CpuPlatform

    if vars(model_manager)["get_supported_lora_modules"] is modules_but_experts:
        return
    name = f"{PunicaWrapper.__module__}.{PunicaWrapper.__qualname__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda _: name)  # type: ignore[method-assign, assignment]
    model_manager.get_supported_lora_modules = modules_but_experts  # type: ignore[attr-defined]
    FusedMoEConfig.__post_init__ = _without_lora(FusedMoEConfig.__post_init__)  # type: ignore[method-assign]


def modules_but_experts(model: torch.nn.Module) -> list[str]:
    """Names of the modules that adapters may change, as the last part of their path."""
    experts = {path.split(".")[-1] for path, module in model.named_modules() if isinstance(module, MoERunner)}
    return [name for name in get_supported_lora_modules(model) if name not in experts]


def _without_lora(post_init: Callable[[FusedMoEConfig], None]) -> Callable[[FusedMoEConfig], None]:
    @functools.wraps(post_init)
    def chosen(self: FusedMoEConfig) -> None:
        self.is_lora_enabled = False
        post_init(self)

    return chosen
