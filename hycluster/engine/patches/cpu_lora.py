"""A request without an adapter, beside requests with one, on CPU.

What: what an adapter would add to a token that has none is zero; log probabilities of a prompt are computed with the
adapters of its own tokens.
Why: a token of a request without an adapter has the adapter index -1. vLLM's kernels for GPUs skip those; its CPU
operations index with them, and take the adapter in the last slot: a base model's answer then changes with what else
runs. Logits are computed of the tokens that are sampled from, and for ``prompt_logprobs`` of a prompt's too, but vLLM
takes the sampled ones' adapters for both: beside other requests the numbers differ, and the engine dies.
Upstream: vllm-project/vllm#48421, vllm-project/vllm#49656; for prompts vllm-project/vllm#16668; all open.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_cpu_lora.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from typing import Any

import torch
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
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
        rows = x.view(-1, x.shape[-1])
        adapters = self._adapters_of(rows)
        # A row of zeros has no logits to add.
        rows = torch.where(adapters.unsqueeze(-1) < 0, 0, rows)
        buffer = torch.zeros((len(rows), lora_b_stacked.size(-1)), dtype=torch.float32, device=x.device)
        bgmv_shrink(rows, lora_a_stacked, buffer, adapters, scale)
        bgmv_expand(buffer, lora_b_stacked, y.view(-1, y.shape[-1]), adapters, add_inputs=True)

    def _adapters_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Of hidden states whose logits are asked for: those of a prompt are a piece of all of the step's."""
        if len(rows) == len(self.sampler_indices) and rows.untyped_storage().nbytes() == rows.nbytes:
            return self.sampler_indices
        first = rows.storage_offset() // rows.shape[-1]
        return self.token_lora_indices[first : first + len(rows)]


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
