from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hycluster.engine.patches.cpu_gatherv import all_gatherv, patch_collectives, reduce_scatterv

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

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


def test_vllms_own_still_has_neither() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    own = inspect.getsource(CpuCommunicator)
    assert "def all_gatherv" not in own
    assert "def reduce_scatterv" not in own


def test_they_are_put_there() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    patch_collectives()
    assert CpuCommunicator.all_gatherv is all_gatherv
    assert CpuCommunicator.reduce_scatterv is reduce_scatterv


def test_other_platforms_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    monkeypatch.delattr(CpuCommunicator, "all_gatherv", raising=False)
    patch_collectives()
    assert "all_gatherv" not in vars(CpuCommunicator)
