from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
import torch

from hycluster.engine.patches.cpu_experts import of_own_experts, own_pairs, patch_experts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXPERTS, HIDDEN, TOKENS, TOP_K = 6, 4, 9, 3


def experts_apply(
    scale: Any, output: torch.Tensor, states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
    weights: torch.Tensor, ids: torch.Tensor, *_: Any, **__: Any,
) -> None:  # fmt: skip
    """In the place of vLLM's kernel: an expert is a matrix."""
    assert len(states), "the kernel takes no empty batch"
    output.copy_(torch.einsum("tk,tkij,tj->ti", weights, w1[ids.long()], states))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_shares_add_up(ranks: int) -> None:
    torch.manual_seed(0)
    matrices, states = torch.randn(EXPERTS, HIDDEN, HIDDEN), torch.randn(TOKENS, HIDDEN)
    ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices.int()
    weights = torch.rand(TOKENS, TOP_K)
    whole = torch.empty(TOKENS, HIDDEN)
    experts_apply(None, whole, states, matrices, matrices, weights, ids)
    total = torch.zeros(TOKENS, HIDDEN)
    for rank in range(ranks):
        mine = torch.arange(rank, EXPERTS, ranks)
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        share = torch.full((TOKENS, HIDDEN), torch.nan)
        of_own_experts(experts_apply)(
            None, share, states, matrices[mine], matrices[mine], weights, ids, "silu", EXPERTS, expert_map
        )
        total += share
    torch.testing.assert_close(total, whole)


def test_without_a_map_nothing_changes() -> None:
    seen: list[Any] = []
    apply = of_own_experts(lambda *arguments, **_: seen.append(arguments))
    tensors = [torch.zeros(1) for _ in range(6)]
    apply(None, *tensors, "silu", 8, None, "rest")
    assert seen == [(None, *tensors, "silu", 8, None, "rest")]


def test_a_rank_without_work_gives_zeros() -> None:
    output = torch.full((2, HIDDEN), torch.nan)
    expert_map = torch.tensor([-1, -1, 0])
    ids, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    matrices = torch.ones(1, HIDDEN, HIDDEN)
    of_own_experts(experts_apply)(
        None, output, torch.ones(2, HIDDEN), matrices, matrices, weights, ids, "silu", 3, expert_map
    )
    assert not output.any()


def test_only_own_pairs_are_computed() -> None:
    ids, weights = torch.tensor([[0, 3], [2, 1], [3, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    tokens, local, share = own_pairs(ids, weights, torch.tensor([-1, -1, 0, 1]))
    assert tokens.tolist() == [0, 1, 2, 2]
    assert local.tolist() == [[1], [0], [1], [0]]
    torch.testing.assert_close(share, torch.tensor([[0.2], [0.3], [0.5], [0.6]]))


def test_it_is_there_once() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    patch_experts()
    applied = CPUUnquantizedExperts.apply
    patch_experts()
    assert CPUUnquantizedExperts.apply is applied


def test_vllms_own_still_does_not_look_at_the_map() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    # The source of what is patched is that of vLLM's own.
    tree = ast.parse(textwrap.dedent(inspect.getsource(CPUUnquantizedExperts.apply)))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "expert_map"]
