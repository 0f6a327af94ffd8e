"""Which KV blocks an engine's prefix cache holds, noted as they come and go.

Pinned to vLLM 0.32.0, into whose internals it reaches; ``tests/engine/test_cached_blocks.py`` says what for:

- ``BlockPool.cached_block_hash_to_block`` is all that a lookup asks, and blocks get into it and out of it by ``insert``
  and ``pop`` alone. So a map that notes the first block of a hash and the last one notes all there is to know: vLLM's
  own events tell of each copy of a block, and cost a list of its tokens.
- A reset puts another map in its place; that is how it is noticed.
- A hash is followed by the number of its KV cache group, of four bytes.

What a request finds cached is the number of its leading blocks that are there, where the model has one KV cache group
and that has full attention. With others (a sliding window, Mamba's states) it isn't so simple: such an engine
tells nothing, and is routed to by load. Nor does it tell of host memory (``hardware.kv_offload_gib``): see
``docs/decisions.md``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from hycluster.engine.block_changes import NAME_BYTES, encode_changes
from hycluster.engine.patches.adapter_loading import AdaptersFirst
from hycluster.engine.patches.pinned import pinned_to
from hycluster.engine.protocol import BlockNaming

pinned_to("vllm", "0.32.0", __name__)

_GROUP_BYTES = 4
_NAME = slice(-_GROUP_BYTES - NAME_BYTES, -_GROUP_BYTES)


class NotingMap(BlockHashToBlockMap):
    """vLLM's map of cached blocks, which notes what has changed since it was last asked."""

    def __init__(self, blocks: BlockHashToBlockMap) -> None:
        self._cache = blocks._cache
        self.stored: set[bytes] = set()
        self.dropped: set[bytes] = set()

    def insert(self, key: BlockHashWithGroupId, block: KVCacheBlock) -> None:
        if key not in self._cache:
            self._note(key, self.stored, self.dropped)
        super().insert(key, block)

    def pop(self, key: BlockHashWithGroupId, block_id: int) -> KVCacheBlock | None:
        found = super().pop(key, block_id)
        if found is not None and key not in self._cache:
            self._note(key, self.dropped, self.stored)
        return found

    @staticmethod
    def _note(key: bytes, what: set[bytes], opposite: set[bytes]) -> None:
        name = key[_NAME]
        if name in opposite:
            opposite.remove(name)
        else:
            what.add(name)

    @property
    def names(self) -> Iterable[bytes]:
        """Of all blocks."""
        return (key[_NAME] for key in self._cache)


class CachedBlocks:
    """What followers are to be told of one engine's KV blocks. For the engine's own thread.

    Attributes:
        followers: clients that have asked.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.followers: tuple[int, ...] = ()
        self._pool = scheduler.kv_cache_manager.block_pool
        self._map: NotingMap | None = None
        # Other engines' are as unlikely to be the same as two readings of the clock.
        self._epoch = time.time_ns()

    def follow(self, client: int) -> bytes:
        """All blocks as they are now, for a client that is told of changes from now on; ask :meth:`changes` first."""
        if self._map is None:
            self._pool.cached_block_hash_to_block = self._map = NotingMap(self._pool.cached_block_hash_to_block)
        self.followers = (*(each for each in self.followers if each != client), client)
        return encode_changes(self._epoch, self._map.names, whole=True)

    def leave(self, client: int) -> None:
        """Nothing is noted any more when the last one has left."""
        self.followers = tuple(each for each in self.followers if each != client)
        if not self.followers and self._map is not None:
            if self._pool.cached_block_hash_to_block is self._map:
                plain = BlockHashToBlockMap()
                plain._cache = self._map._cache
                self._pool.cached_block_hash_to_block = plain
            self._map = None

    def changes(self) -> bytes | None:
        """What is new for the followers; None if nothing is."""
        noted = self._map
        if noted is None:
            return None
        if self._pool.cached_block_hash_to_block is not noted:
            self._epoch += 1
            self._pool.cached_block_hash_to_block = self._map = NotingMap(self._pool.cached_block_hash_to_block)
            return encode_changes(self._epoch, self._map.names, whole=True)
        if not noted.stored and not noted.dropped:
            return None
        frame = encode_changes(self._epoch, noted.stored, noted.dropped)
        noted.stored, noted.dropped = set(), set()
        return frame


class ToldBlocks(NamedTuple):
    """In an engine core's output queue: what these clients are to hear with their next message."""

    followers: tuple[int, ...]
    frame: bytes


class BlockTeller(AdaptersFirst):
    """vLLM's engine core, which tells what becomes of its KV blocks ahead of what the same step, or reset, says."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._blocks = cached_blocks(self.scheduler)

    def step(self) -> Any:
        done = super().step()
        self._tell_changes()
        return done

    def step_with_batch_queue(self) -> Any:
        done = super().step_with_batch_queue()
        self._tell_changes()
        return done

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        done = super().reset_prefix_cache(reset_running_requests, reset_connector)
        self._tell_changes()
        return done

    def follow_blocks(self, client: int) -> None:
        """Called in the engine's own thread."""
        if self._blocks is not None:
            self._tell_changes()
            self._tell_followers((client,), self._blocks.follow(client))

    def leave_blocks(self, client: int) -> None:
        """Called in the engine's own thread."""
        if self._blocks is not None:
            self._blocks.leave(client)

    def _tell_changes(self) -> None:
        if self._blocks is not None and (changes := self._blocks.changes()) is not None:
            self._tell_followers(self._blocks.followers, changes)

    def _tell_followers(self, followers: tuple[int, ...], frame: bytes) -> None:
        self.output_queue.put_nowait(ToldBlocks(followers, frame))  # type: ignore[arg-type]


def cached_blocks(scheduler: Any) -> CachedBlocks | None:
    """For an engine's scheduler; None where what a request finds cached can't be told by its blocks."""
    manager = scheduler.kv_cache_manager
    coordinator = manager.coordinator
    if not manager.enable_caching or not isinstance(coordinator, UnitaryKVCacheCoordinator):
        return None
    if type(coordinator.single_type_managers[0]) is not FullAttentionManager:
        return None
    return CachedBlocks(scheduler)


def block_naming(scheduler: Any) -> BlockNaming | None:
    """How the engine of this scheduler names its blocks; None where it does not tell of them."""
    if cached_blocks(scheduler) is None:
        return None
    return BlockNaming(
        tokens=scheduler.hash_block_size,
        algorithm=scheduler.vllm_config.cache_config.prefix_caching_hash_algo,
        root=kv_cache_utils.NONE_HASH,
        computed_again=len(scheduler.kv_cache_manager.coordinator.eagle_group_ids),
    )
