"""KV blocks of conversations are kept between their turns: they go later than others that were used as lately.

vLLM's block pool takes blocks for new tokens from the front of a queue, and puts those that a request leaves at its
end, so that what was not used for longest goes first. Here what a session's request leaves counts as used some seconds
later than it was: it stays behind what others leave in that time, and from then on it goes in its turn. So a session
that has ended crowds out nobody for long; nor do many, since so much of the cache at most is kept, and what is over
goes in its turn at once.

Which blocks are handed out is all that changes: what is in one, and whether it is cached, vLLM's pool knows as before.

Pinned to vLLM 0.32.0, into whose internals it reaches; ``tests/engine/test_warm_blocks.py`` runs it in vLLM's own pool:

- the pool's ``free_block_queue`` is a list that is linked by its blocks' ``prev_free_block`` and ``next_free_block``,
  between two that are none, with its length in ``num_free_blocks``;
- blocks get into it by ``append``, ``append_n`` and ``prepend_n`` and out of it by ``popleft``, ``popleft_n`` and
  ``remove`` alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

# Of all blocks, so many are kept at most.
MOST_KEPT = 0.5


class WarmQueue(FreeKVCacheBlockQueue):
    """vLLM's queue of blocks that nobody uses, in the order in which they go; in the place of a pool's own.

    Args:
        keep_s: how much later than it was a session's blocks count as used.
        clock: seconds.

    Attributes:
        keeping: what comes now is a session's.
    """

    def __init__(self, pool: BlockPool, keep_s: float, clock: Callable[[], float]) -> None:
        queue = pool.free_block_queue
        self.fake_free_list_head, self.fake_free_list_tail = queue.fake_free_list_head, queue.fake_free_list_tail
        self.num_free_blocks = queue.num_free_blocks
        self.keeping = False
        self._keep_s, self._clock, self._most = keep_s, clock, int(MOST_KEPT * pool.num_gpu_blocks)
        # The last ones of the list, in its order: by number, a block and when it counts as used.
        self._kept: OrderedDict[int, tuple[KVCacheBlock, float]] = OrderedDict()
        pool.free_block_queue = self

    @property
    def kept(self) -> int:
        """Blocks that count as used later than they were."""
        return len(self._kept)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        if not blocks:
            return
        now_s, kept = self._clock(), self._kept
        if self.keeping:
            super().append_n(blocks)
            used_s = now_s + self._keep_s
            kept.update((block.block_id, (block, used_s)) for block in blocks)
        while kept and (len(kept) > self._most or next(iter(kept.values()))[1] <= now_s):
            kept.popitem(last=False)
        if self.keeping:
            return
        if not kept:
            super().append_n(blocks)
            return
        behind, _ = next(iter(kept.values()))
        last = behind.prev_free_block
        assert last is not None
        for block in blocks:
            last.next_free_block, block.prev_free_block = block, last
            last = block
        last.next_free_block, behind.prev_free_block = behind, last
        self.num_free_blocks += len(blocks)

    def remove(self, block: KVCacheBlock) -> None:
        super().remove(block)
        self._kept.pop(block.block_id, None)

    def popleft(self) -> KVCacheBlock:
        block = super().popleft()
        self._kept.pop(block.block_id, None)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        blocks = super().popleft_n(n)
        if self._kept:
            for block in blocks:
                self._kept.pop(block.block_id, None)
        return blocks
