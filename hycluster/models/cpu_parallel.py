"""Expert parallelism on CPU: what vLLM 0.32.0 lacks for it.

- ``CPUUnquantizedExperts.apply`` passes global expert ids to a kernel that indexes the rank's own experts with
  them, which reads past their end. Here every pair of a token and an expert of this rank becomes a row of its
  own, so that a rank computes its share and no more.
- ``CpuCommunicator`` has no ``all_gatherv`` and no ``reduce_scatterv``. Data-parallel ranks exchange the tokens of
  a mixture-of-experts layer with these.

``tests/integration/test_vllm_contract.py`` fails once vLLM does one of them itself.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
import vllm

logger = logging.getLogger(__name__)

VLLM_VERSION = "0.32.0"


def mend() -> None:
    """Put both into vLLM, in this process; more than once does nothing.

    Does nothing on other platforms than CPU. Refuses any other version of vLLM, with an error in the log: then
    expert parallelism works as far as that version does.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        logger.error(
            "expert parallelism on CPU is mended for vLLM %s only; this is %s, and stays as it is",
            VLLM_VERSION,
            vllm.__version__,
        )
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if CpuCommunicator.all_gatherv is all_gatherv:
        return
    CpuCommunicator.all_gatherv = all_gatherv  # type: ignore[method-assign]
    CpuCommunicator.reduce_scatterv = reduce_scatterv  # type: ignore[method-assign]
    CPUUnquantizedExperts.apply = _of_own_experts(CPUUnquantizedExperts.apply)  # type: ignore[method-assign]


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


def _of_own_experts(apply: Callable[..., None]) -> Callable[..., None]:
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

    return applied


def all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: Sequence[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Every rank's rows, in the order of the ranks; ranks may have different numbers of rows.

    Args:
        input_: ``[rows, ...]``, or several such tensors of the same number of rows.
        sizes: rows of each rank; None if all have as many as this one.

    Returns:
        ``[sum(sizes), ...]`` for each tensor.
    """
    if dim != 0:
        raise ValueError(f"all_gatherv: dim {dim} is not allowed; must be 0")
    if isinstance(input_, list):
        return [_gather_rows(self, tensor, sizes) for tensor in input_]
    return _gather_rows(self, input_, sizes)


def _gather_rows(communicator: Any, rows: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    counts = list(sizes) if sizes is not None else [rows.shape[0]] * communicator.world_size
    # Gloo gathers equal parts only.
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded, group=communicator.device_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum over all ranks.

    Args:
        input_: ``[sum(sizes), ...]``.
        sizes: rows that each rank gets; None for equal parts.

    Returns:
        ``[sizes[rank], ...]``.
    """
    if dim != 0:
        raise ValueError(f"reduce_scatterv: dim {dim} is not allowed; must be 0")
    counts = list(sizes) if sizes is not None else [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=self.device_group)
    first = sum(counts[: self.rank_in_group])
    return total[first : first + counts[self.rank_in_group]]
