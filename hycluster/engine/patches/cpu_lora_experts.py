"""A mixture-of-experts model with adapters, on CPU.

What: experts take the CPU's kernels and no adapters; an adapter that brings weights for them is refused.
Why: with LoRA on, vLLM gives a mixture-of-experts layer its Triton kernels, which there are none of on CPU, whether an
adapter touches experts or not.
Upstream: none filed for CPU. The choice came with vllm-project/vllm#40273 (merged), whose review asks about other
platforms than CUDA and leaves them as they are.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_cpu_lora_experts.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import Callable

import torch
from vllm.lora.utils import get_supported_lora_modules
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig


def patch_lora_experts() -> None:
    """Put it into vLLM, in this process; more than once does nothing. Does nothing on other platforms than CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora import model_manager

    if vars(model_manager)["get_supported_lora_modules"] is modules_but_experts:
        return
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
