from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hycluster.models.cpu_parallel import _of_own_experts, all_gatherv, own_pairs, reduce_scatterv

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
        _of_own_experts(experts_apply)(
            None, share, states, matrices[mine], matrices[mine], weights, ids, "silu", EXPERTS, expert_map
        )
        total += share
    torch.testing.assert_close(total, whole)


def test_without_a_map_nothing_changes() -> None:
    seen: list[Any] = []
    apply = _of_own_experts(lambda *arguments, **_: seen.append(arguments))
    tensors = [torch.zeros(1) for _ in range(6)]
    apply(None, *tensors, "silu", 8, None, "rest")
    assert seen == [(None, *tensors, "silu", 8, None, "rest")]


def test_a_rank_without_work_gives_zeros() -> None:
    output = torch.full((2, HIDDEN), torch.nan)
    expert_map = torch.tensor([-1, -1, 0])
    ids, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    matrices = torch.ones(1, HIDDEN, HIDDEN)
    _of_own_experts(experts_apply)(
        None, output, torch.ones(2, HIDDEN), matrices, matrices, weights, ids, "silu", 3, expert_map
    )
    assert not output.any()


def test_only_own_pairs_are_computed() -> None:
    ids, weights = torch.tensor([[0, 3], [2, 1], [3, 2]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    tokens, local, share = own_pairs(ids, weights, torch.tensor([-1, -1, 0, 1]))
    assert tokens.tolist() == [0, 1, 2, 2]
    assert local.tolist() == [[1], [0], [1], [0]]
    torch.testing.assert_close(share, torch.tensor([[0.2], [0.3], [0.5], [0.6]]))


ROWS = [3, 0, 5]


def _exchange(rank: int, store: str, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(ROWS))
    communicator = SimpleNamespace(world_size=len(ROWS), rank_in_group=rank, device_group=dist.group.WORLD)
    floats = torch.full((ROWS[rank], 2), float(rank))
    ids = torch.full((ROWS[rank], 1), rank, dtype=torch.int32)
    gathered = all_gatherv(communicator, [floats, ids], 0, ROWS)
    even = all_gatherv(communicator, torch.tensor([[rank]]))
    before = torch.arange(sum(ROWS) * 2.0).view(-1, 2) * (rank + 1)
    reduced = reduce_scatterv(communicator, before, 0, ROWS)
    assert torch.equal(before, torch.arange(sum(ROWS) * 2.0).view(-1, 2) * (rank + 1)), "the input stays"
    answers.put((rank, [t.tolist() for t in (*gathered, even, reduced)]))
    dist.destroy_process_group()


def test_ranks_exchange_different_numbers_of_rows(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.SimpleQueue()
    started = [
        context.Process(target=_exchange, args=(rank, str(tmp_path / "store"), answers)) for rank in range(len(ROWS))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * len(ROWS)
    owners = [rank for rank, rows in enumerate(ROWS) for _ in range(rows)]
    summed = torch.arange(sum(ROWS) * 2.0).view(-1, 2) * sum(range(1, len(ROWS) + 1))
    whole = [summed[[other == rank for other in owners]].tolist() for rank in range(len(ROWS))]
    for _ in ROWS:
        rank, (floats, ids, even, reduced) = answers.get()
        assert floats == [[float(owner)] * 2 for owner in owners]
        assert ids == [[owner] for owner in owners]
        assert even == [[other] for other in range(len(ROWS))]
        assert reduced == whole[rank]


@pytest.mark.parametrize("exchange", [all_gatherv, reduce_scatterv])
def test_only_rows_are_exchanged(exchange: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="dim 1 is not allowed; must be 0"):
        exchange(SimpleNamespace(world_size=1), torch.zeros(2, 2), 1)


class TestMend:
    @pytest.fixture(autouse=True)
    def _imported(self, vllm_imported: None) -> None:
        pass

    def test_it_is_there_once(self) -> None:
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        from hycluster.models.cpu_parallel import mend

        mend()
        applied = CPUUnquantizedExperts.apply
        mend()
        assert CPUUnquantizedExperts.apply is applied
        assert CpuCommunicator.all_gatherv is all_gatherv
        assert CpuCommunicator.reduce_scatterv is reduce_scatterv

    def test_another_version_is_left_as_it_is(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        import vllm
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

        from hycluster.models.cpu_parallel import mend

        monkeypatch.setattr(vllm, "__version__", "0.33.0+cpu")
        # As it comes from vLLM, the class has the base class' method.
        monkeypatch.delattr(CpuCommunicator, "all_gatherv", raising=False)
        mend()
        assert "mended for vLLM 0.32.0 only; this is 0.33.0+cpu" in caplog.text
        assert "all_gatherv" not in vars(CpuCommunicator)

    def test_other_platforms_are_left_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
        from vllm.platforms import current_platform

        from hycluster.models.cpu_parallel import mend

        monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
        monkeypatch.delattr(CpuCommunicator, "all_gatherv", raising=False)
        mend()
        assert "all_gatherv" not in vars(CpuCommunicator)
