"""A host store for KV blocks where the KV cache itself is on a CPU (``hardware.kv_offload_gib``).

What: vLLM's host store with copies that need no GPU.
Why: vLLM keeps blocks in host memory after the KV cache has dropped them, and brings them back when a prompt begins
alike. Its own store, ``CPUOffloadingSpec``, refuses to run where the cache is not on a GPU: its copies are queued on
streams. On a CPU a copy is an assignment. That gains no memory there, but everything around it (what is stored, looked
up, evicted and counted) is vLLM's, and is shown here as it works on a GPU. On GPUs vLLM's own store is taken.
Upstream: none filed.
Version: vLLM 0.32.0. Named in the engine's arguments (``spec_module_path``). Watched by
``tests/engine/patches/test_kv_offload.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import time

import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):
    """vLLM's host store with copies that need no GPU. Named in vLLM's configuration (``spec_module_path``)."""

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._copies: HostCopies | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._copies is None:
            self._copies = HostCopies(kv_caches, self.num_chunks)
        return self._copies


class HostCopies(OffloadingWorker):
    """Copies between a KV cache in host memory and a store in host memory; a copy is done when its call returns.

    Args:
        kv_caches: the cache's tensors, each ``[blocks, bytes a block]``.
        chunks: blocks that the store holds; vLLM makes a chunk of one block unless told otherwise.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._groups = kv_caches.group_data_refs
        self._cache = [entry.tensor for entry in kv_caches.tensors]
        self._store = [torch.zeros((chunks, tensor.shape[1]), dtype=torch.int8) for tensor in self._cache]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._copy(job_id, src_spec, self._cache, src_spec, self._store, dst_spec)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._copy(job_id, dst_spec, self._store, src_spec, self._cache, dst_spec)
        return True

    def _copy(
        self,
        job_id: int,
        blocks: GPULoadStoreSpec,
        sources: list[torch.Tensor],
        source: LoadStoreSpec,
        targets: list[torch.Tensor],
        target: LoadStoreSpec,
    ) -> None:
        begun_s = time.monotonic()
        copied_bytes, first = 0, 0
        source_ids, target_ids = _block_ids(source), _block_ids(target)
        # The blocks of each group of layers come one group after the other.
        for size, refs in zip(blocks.group_sizes, self._groups, strict=True):
            group = slice(first, first + size)
            for ref in refs:
                index, length = ref.tensor_idx, ref.page_size_bytes
                targets[index][target_ids[group], :length] = sources[index][source_ids[group], :length]
                copied_bytes += size * length
            first += size
        self._finished.append(TransferResult(job_id, True, copied_bytes, time.monotonic() - begun_s))

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for."""


def _block_ids(spec: LoadStoreSpec) -> torch.Tensor:
    assert isinstance(spec, BlockIDsLoadStoreSpec)
    return torch.from_numpy(spec.block_ids).long()
