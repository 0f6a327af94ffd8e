"""Data-parallel ranks exchange the tokens of a mixture-of-experts layer, on CPU.

What: ``CpuCommunicator`` has an ``all_gatherv`` and a ``reduce_scatterv``.
Why: vLLM's exchange of tokens between data-parallel ranks calls both, and its communicator for CPUs has neither: ranks
with different numbers of rows can't exchange them.
Upstream: vllm-project/vllm#57837 (open) names both as missing; vllm-project/vllm#47778 (open) adds them.
Version: vLLM 0.32.0. Applied by the models' plugin in every process of vLLM's. Watched by
``tests/engine/patches/test_cpu_gatherv.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed


def patch_collectives() -> None:
    """Put both into vLLM, in this process; more than once does nothing. Does nothing on other platforms than CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv  # type: ignore[method-assign]
    CpuCommunicator.reduce_scatterv = reduce_scatterv  # type: ignore[method-assign]


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
