"""Copies between a KV cache and a store, both in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from hycluster.engine.patches.kv_offload import HostCopies

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]


@pytest.fixture
def caches() -> list[torch.Tensor]:
    """Two tensors of 6 blocks; every byte of a block is its number, plus 10 in the second tensor."""
    import torch

    return [
        (torch.arange(6, dtype=torch.int8) + 10 * number).unsqueeze(1).repeat(1, 4 * (number + 1))
        for number in range(2)
    ]


@pytest.fixture
def copies(caches: list[torch.Tensor]) -> HostCopies:
    """Two groups of layers: the first one has both tensors, the second one the first tensor."""
    from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

    from hycluster.engine.patches.kv_offload import HostCopies

    tensors = [CanonicalKVCacheTensor(tensor, tensor.shape[1]) for tensor in caches]
    refs = [CanonicalKVCacheRef(number, tensor.shape[1]) for number, tensor in enumerate(caches)]
    return HostCopies(CanonicalKVCaches(tensors, [refs, refs[:1]]), chunks=4)


def specs(cache_blocks: list[int], group_sizes: list[int], chunks: list[int]) -> tuple[Any, Any]:
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    return GPULoadStoreSpec(cache_blocks, group_sizes, [0, 0]), CPULoadStoreSpec(chunks)


def test_what_was_stored_comes_back_to_other_blocks(copies: HostCopies, caches: list[torch.Tensor]) -> None:
    # Blocks 1 and 2 of the first group, 3 of the second.
    assert copies.submit_store(1, *specs([1, 2, 3], [2, 1], [0, 3, 1]))
    for tensor in caches:
        tensor.fill_(-1)
    blocks, chunks = specs([5, 4, 0], [2, 1], [0, 3, 1])
    assert copies.submit_load(2, chunks, blocks)
    assert caches[0].tolist() == [[number] * 4 for number in (3, -1, -1, -1, 2, 1)]
    assert caches[1].tolist() == [[number] * 8 for number in (-1, -1, -1, -1, 12, 11)]


def test_each_job_is_finished_once_and_tells_its_bytes(copies: HostCopies) -> None:
    copies.submit_store(1, *specs([1, 2, 3], [2, 1], [0, 3, 1]))
    copies.wait({1})
    (done,) = copies.get_finished()
    assert (done.job_id, done.success, done.transfer_size) == (1, True, 2 * (4 + 8) + 4)
    assert done.transfer_time is not None
    assert copies.get_finished() == []


def test_the_store_is_named_by_module() -> None:
    from vllm.v1.kv_offload.base import OffloadingWorker
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from hycluster.engine.patches.kv_offload import HostOffloadingSpec

    named = {"spec_name": "HostOffloadingSpec", "spec_module_path": "hycluster.engine.patches.kv_offload"}
    assert OffloadingSpecFactory.get_spec_cls(named) is HostOffloadingSpec
    assert OffloadingWorker.__abstractmethods__ == {"submit_store", "submit_load", "get_finished", "wait"}


def test_vllms_own_still_refuses_a_cpu() -> None:
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    spec: Any = object.__new__(CPUOffloadingSpec)
    spec._worker = None
    with pytest.raises(Exception, match="currently only supported on CUDA-alike"):
        spec.get_worker(None)
