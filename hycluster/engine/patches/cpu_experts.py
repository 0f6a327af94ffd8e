"""The experts of one rank of several, on CPU.

What: ``CPUUnquantizedExperts.apply`` is given every pair of a token and an expert of this rank as a row of its own, so
that a rank computes its share and no more.
Why: vLLM's passes global expert ids to a kernel that indexes the rank's own experts with them, which reads past their
end.
Upstream: vllm-project/vllm#57837 (open) asks for expert parallelism on CPU; vllm-project/vllm#47778 (open) adds it.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_cpu_experts.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import Callable
from typing import Any

import torch

# On the wrapped method, so that it is wrapped once.
PATCHED = "hycluster_own_experts"


def patch_experts() -> None:
    """Put it into vLLM, in this process; more than once does nothing. Does nothing on other platforms than CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if not hasattr(CPUUnquantizedExperts.apply, PATCHED):
        CPUUnquantizedExperts.apply = of_own_experts(CPUUnquantizedExperts.apply)  # type: ignore[method-assign]


def own_pairs(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of a token and an expert that this rank computes.

    Args:
        topk_ids: ``[tokens, k]``, global expert ids.
        topk_weights: ``[tokens, k]``.
        expert_map: ``[experts]``, the rank's own index of each expert, -1 for those of other ranks.

    Returns:
        The token of each pair ``[pairs]``, its local expert id ``[pairs, 1]`` and its weight ``[pairs, 1]``.
    """
    local = expert_map[topk_ids.long()]
    token, choice = (local >= 0).nonzero(as_tuple=True)
    ids = local[token, choice].to(topk_ids.dtype)
    return token, ids.unsqueeze(1), topk_weights[token, choice].unsqueeze(1)


def of_own_experts(apply: Callable[..., None]) -> Callable[..., None]:
    """vLLM's ``CPUUnquantizedExperts.apply``, given only what this rank's experts have to do."""

    @functools.wraps(apply)
    def applied(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *rest: Any,
        **named: Any,
    ) -> None:
        def run(output: torch.Tensor, states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
            apply(self, output, states, w1, w2, weights, ids, activation, global_num_experts, None, *rest, **named)

        if expert_map is None:
            run(output, hidden_states, topk_weights, topk_ids)
            return
        tokens, ids, weights = own_pairs(topk_ids, topk_weights, expert_map)
        output.zero_()
        if len(tokens):
            parts = output.new_empty(len(tokens), output.shape[-1])
            run(parts, hidden_states[tokens], weights, ids)
            output.index_add_(0, tokens, parts)

    setattr(applied, PATCHED, True)
    return applied
