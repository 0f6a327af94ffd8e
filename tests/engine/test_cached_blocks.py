"""What ``hycluster/engine/cached_blocks.py`` relies on in vLLM 0.32.0, and what it tells of vLLM's own scheduler and KV
cache manager, in virtual time."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hycluster.core import Priority
from hycluster.engine.block_changes import decode_changes
from tests.engine.test_scheduler import Case, make_case

pytestmark = pytest.mark.usefixtures("vllm_imported")

FEW_BLOCKS = 96


class Follower:
    """A gateway that believes what it is told."""

    def __init__(self, whole: bytes) -> None:
        self.names: set[int] = set()
        self.hear(whole)

    def hear(self, frame: bytes | None) -> None:
        assert frame is not None
        changes = decode_changes(frame)
        stored, dropped = set(changes.stored.tolist()), set(changes.dropped.tolist())
        assert not stored & dropped
        if changes.whole:
            self.names, self.epoch = stored, changes.epoch
            return
        assert changes.epoch == self.epoch
        assert not stored & self.names
        assert dropped <= self.names
        self.names = (self.names | stored) - dropped


def held(case: Case) -> set[int]:
    """What a lookup would find, by vLLM's map."""
    pool: Any = case.engine.scheduler.kv_cache_manager.block_pool
    return {int.from_bytes(key[-12:-4], "big") for key in pool.cached_block_hash_to_block._cache}


def followed(case: Case, client: int = 1) -> tuple[Any, Follower]:
    from hycluster.engine.cached_blocks import cached_blocks

    blocks = cached_blocks(case.engine.scheduler)
    assert blocks is not None
    return blocks, Follower(blocks.follow(client))


def conversations(chance: random.Random, count: int) -> Iterable[list[int]]:
    """Prompts that share beginnings of any length."""
    kept: list[list[int]] = [[]]
    for _ in range(count):
        begin = chance.choice(kept)
        begin = begin[: chance.randrange(len(begin) + 1)]
        prompt = begin + [chance.randrange(250) for _ in range(chance.randrange(1, 200))]
        kept = [*kept[-20:], prompt[:900]]
        yield prompt


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_follower_knows_what_vllm_has_after_each_step(tiny_model: Path, asynchronous: bool) -> None:
    chance = random.Random(3)
    case = make_case(tiny_model, blocks=FEW_BLOCKS, asynchronous=asynchronous)
    blocks, follower = followed(case)
    resets = dropped = 0
    for number, prompt in enumerate(conversations(chance, 400)):
        priority = int(chance.choice([Priority.ONLINE, Priority.BATCH]))
        case.engine.add(f"r{number}", prompt, chance.randrange(1, 40), priority)
        if chance.random() < 0.1:
            case.engine.scheduler.finish_requests(f"r{number - 3}", _aborted())
        while case.engine.has_work and (chance.random() < 0.8 or number % 50 == 49):
            case.step()
            before = len(follower.names)
            if (frame := blocks.changes()) is not None:
                follower.hear(frame)
            assert follower.names == held(case)
            dropped += len(follower.names) < before
        if number % 50 == 49:
            case.engine._flights.clear()
            assert case.engine.scheduler.reset_prefix_cache()
            epoch, resets = follower.epoch, resets + 1
            follower.hear(blocks.changes())
            assert (follower.names, follower.epoch) == (set(), epoch + 1)
    assert resets == 8
    assert dropped > 50, "blocks were evicted"
    assert blocks.changes() is None


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def test_blocks_stored_after_a_reset_are_told_with_it(tiny_model: Path) -> None:
    case = make_case(tiny_model)
    blocks, follower = followed(case)
    case.add("a", 100, 4, Priority.ONLINE)
    case.finish("a")
    follower.hear(blocks.changes())
    # Nobody asks between the reset and the next step.
    assert case.engine.scheduler.reset_prefix_cache()
    case.add("b", 60, 4, Priority.ONLINE)
    case.finish("b")
    follower.hear(blocks.changes())
    assert follower.names == held(case)
    assert len(follower.names) == 3


def test_nothing_is_noted_while_nobody_follows(tiny_model: Path) -> None:
    from vllm.v1.core.block_pool import BlockHashToBlockMap

    from hycluster.engine.cached_blocks import cached_blocks

    case = make_case(tiny_model)
    pool = case.engine.scheduler.kv_cache_manager.block_pool
    blocks = cached_blocks(case.engine.scheduler)
    assert blocks is not None
    case.add("a", 100, 4, Priority.ONLINE)
    case.finish("a")
    assert (type(pool.cached_block_hash_to_block), blocks.changes()) == (BlockHashToBlockMap, None)
    first, second = Follower(blocks.follow(1)), Follower(blocks.follow(2))
    assert first.names == second.names == held(case) != set()
    assert blocks.followers == (1, 2)
    blocks.leave(1)
    blocks.leave(1)
    case.add("b", 100, 4, Priority.ONLINE)
    case.finish("b")
    second.hear(blocks.changes())
    assert second.names == held(case)
    blocks.leave(2)
    assert (type(pool.cached_block_hash_to_block), blocks.changes()) == (BlockHashToBlockMap, None)
    assert second.names == held(case)


def test_what_changes_the_map_of_cached_blocks() -> None:
    """Lookups ask it alone; blocks come by ``insert`` and go by ``pop``; a reset replaces it."""
    from vllm.v1.core import block_pool

    source = inspect.getsource(block_pool.BlockPool)
    calls = set(re.findall(r"cached_block_hash_to_block\s*\.\s*(\w+)\(", source))
    assert calls == {"get_one_block", "contain", "insert", "pop"}
    assert re.findall(r"self\.cached_block_hash_to_block(?:: \w+)? = (.+)", source) == ["BlockHashToBlockMap()"] * 2
    changed = set(re.findall(r"self\._cache(?:\[key\] =|\.pop|: )", inspect.getsource(block_pool.BlockHashToBlockMap)))
    assert changed == {"self._cache[key] =", "self._cache.pop", "self._cache: "}


def test_what_an_engine_core_is_stepped_and_reset_by() -> None:
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    made = inspect.getsource(EngineCore.__init__)
    assert "self.step if self.batch_queue is None else self.step_with_batch_queue" in made
    stepped = inspect.getsource(EngineCoreProc._process_engine_step)
    assert stepped.index("self.step_fn()") < stepped.index("self.output_queue.put_nowait(output)")
    assert "self.reset_prefix_cache(" in inspect.getsource(EngineCore._reset_caches)
    for who in (EngineCore.sleep, EngineCore.pause_scheduler, EngineCoreProc.pause_scheduler):
        assert "clear_cache" in inspect.getsource(who)


def test_how_much_of_a_prompt_is_looked_up() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    assert "max_cache_hit_length = request.num_tokens - 1" in inspect.getsource(KVCacheManager.get_computed_blocks)
    found = inspect.getsource(FullAttentionManager.find_longest_cache_hit)
    assert (
        "if drop_eagle_block and hit_length > 0:\n            hit_length -= min(alignment_tokens, block_size)" in found
    )


def test_an_engine_without_a_prefix_cache_does_not_tell(tiny_model: Path) -> None:
    from hycluster.engine.cached_blocks import block_naming, cached_blocks

    case = make_case(tiny_model, engine={"enable_prefix_caching": False})
    assert cached_blocks(case.engine.scheduler) is None
    assert block_naming(case.engine.scheduler) is None


def test_how_blocks_are_named(tiny_model: Path) -> None:
    from vllm.v1.core import kv_cache_utils

    from hycluster.engine.cached_blocks import block_naming

    naming = block_naming(make_case(tiny_model).engine.scheduler)
    assert naming is not None
    assert (naming.tokens, naming.algorithm, naming.computed_again) == (16, "sha256", 0)
    assert naming.root == kv_cache_utils.NONE_HASH
