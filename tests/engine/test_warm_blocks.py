"""Sessions' KV blocks are kept between their turns: in vLLM's own block pool, in virtual time."""

from __future__ import annotations

import inspect
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import Priority
from tests.engine.test_cached_blocks import conversations, followed, held
from tests.engine.test_scheduler import Case, make_case

if TYPE_CHECKING:
    from hycluster.simulate.engine import TokenAt

pytestmark = pytest.mark.usefixtures("vllm_imported")

BLOCKS, TURN = 96, 320


def ask(case: Case, name: str, prompt: list[int], session: str | None = None, bulk: bool = False) -> int:
    """Tokens that were found cached."""
    engine = case.engine
    engine.add(name, prompt, 2, int(Priority.BATCH if bulk else Priority.ONLINE), session_id=session)
    return finish(case)[0].cached


def finish(case: Case) -> list[TokenAt]:
    said: list[TokenAt] = []
    while case.engine.has_work:
        said += case.engine.step()
    return said


def once(case: Case, count: int, begin: int) -> None:
    """Prompts of 20 blocks that nobody asks again."""
    for number in range(begin, begin + count):
        ask(case, f"once{number}", [number % 250] * TURN)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("keep_s", "session", "bulk", "found"),
    [(60, "s", False, TURN - 16), (0, "s", False, 0), (60, None, False, 0), (60, "s", True, 0)],
    ids=["kept", "off", "no session", "bulk"],
)
def test_a_turn_finds_what_the_last_one_left(
    tiny_model: Path, asynchronous: bool, keep_s: float, session: str | None, bulk: bool, found: int
) -> None:
    """Between them there were as many others as fill the cache."""
    case = make_case(tiny_model, blocks=BLOCKS, asynchronous=asynchronous, keep_sessions_s=keep_s)
    turn = [7 * i % 250 for i in range(TURN)]
    ask(case, "first", turn, session, bulk)
    once(case, 6, 100)
    assert ask(case, "second", turn) == found


def test_a_session_that_has_ended_goes_in_its_turn(tiny_model: Path) -> None:
    case = make_case(tiny_model, blocks=BLOCKS, keep_sessions_s=60)
    turn = [7 * i % 250 for i in range(TURN)]
    ask(case, "first", turn, "s")
    once(case, 6, 100)
    # As if it was used now.
    case.engine.now_s += 61
    once(case, 2, 110)
    assert case.engine.scheduler._warm.kept == 0  # type: ignore[attr-defined]
    once(case, 6, 120)
    assert ask(case, "second", turn) == 0


def test_the_oldest_session_goes_first_and_half_of_the_cache_is_kept_at_most(tiny_model: Path) -> None:
    case = make_case(tiny_model, blocks=BLOCKS, keep_sessions_s=600)
    for session in range(4):
        ask(case, f"s{session}", [session] * TURN, str(session))
    assert case.engine.scheduler._warm.kept == 48  # type: ignore[attr-defined]
    once(case, 12, 100)
    # Of the second of these the begin is there: a prefix goes from its end.
    assert [ask(case, f"again{session}", [session] * TURN) for session in (3, 2, 1, 0)] == [304, 304, 128, 0]


def test_what_a_session_shares_with_a_running_request_is_not_free(tiny_model: Path) -> None:
    """It is in use, and then it is kept or goes with whoever leaves it last."""
    case = make_case(tiny_model, blocks=BLOCKS, keep_sessions_s=60)
    turn = [7 * i % 250 for i in range(TURN)]
    case.engine.add("long", turn, 40, int(Priority.ONLINE))
    for _ in range(3):
        case.engine.step()
    case.engine.add("turn", turn, 2, int(Priority.ONLINE), session_id="s")
    finish(case)
    check(case)


def test_conversations_gain_more_than_others_lose(tiny_model: Path) -> None:
    """Turns with pauses, and prompts that come once but for their system prompts."""
    from bench.warm_sessions import serve

    plain, kept = (serve(tiny_model, keep_s, 0.5, 150, 0) for keep_s in (0, 60))
    assert kept["turns"][0] > 1.5 * plain["turns"][0]
    assert kept["turns"][1] < plain["turns"][1]
    assert kept["once"][0] > 0.85 * plain["once"][0]
    assert kept["all"][0] > plain["all"][0]
    assert kept["all"][1] < plain["all"][1]


def check(case: Case) -> None:
    """The list is whole, all that is kept is at its end, and no block is in it twice or while it is used."""
    pool: Any = case.engine.scheduler.kv_cache_manager.block_pool
    queue = pool.free_block_queue
    blocks, block = [], queue.fake_free_list_head
    while (block := block.next_free_block) is not queue.fake_free_list_tail:
        assert block.prev_free_block.next_free_block is block
        assert block.ref_cnt == 0
        blocks.append(block.block_id)
    assert len(set(blocks)) == len(blocks) == queue.num_free_blocks == pool.get_num_free_blocks()
    assert blocks[len(blocks) - queue.kept :] == list(queue._kept)
    used = [used_s for _, used_s in queue._kept.values()]
    assert used == sorted(used)
    assert queue.kept <= len(pool.blocks) // 2
    in_use = {block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null}
    assert in_use | set(blocks) == set(range(1, len(pool.blocks)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_pool_stays_whole_and_what_is_told_of_it_true(tiny_model: Path, asynchronous: bool) -> None:
    """Preemptions, aborts, bulk rows and resets among it."""
    chance = random.Random(4)
    case = make_case(tiny_model, blocks=BLOCKS, asynchronous=asynchronous, keep_sessions_s=2)
    scheduler: Any = case.engine.scheduler
    blocks, follower = followed(case)
    for number, prompt in enumerate(conversations(chance, 400)):
        session = chance.choice([None, "a", "b"])
        priority = int(Priority.BATCH if chance.random() < 0.2 else Priority.ONLINE)
        case.engine.add(f"r{number}", prompt, chance.randrange(1, 60), priority, session_id=session)
        while case.engine.has_work and chance.random() < 0.9:
            case.engine.step()
            if (said := blocks.changes()) is not None:
                follower.hear(said)
            check(case)
            assert follower.names == held(case)
        if chance.random() < 0.05:
            case.engine.now_s += chance.choice([1, 5])
        if number % 100 == 99:
            finish(case)
            case.engine._flights.clear()
            assert scheduler.reset_prefix_cache()
            follower.hear(blocks.changes())
            check(case)
    finish(case)
    check(case)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def test_the_pool_reaches_its_queue_by_these_alone() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    from hycluster.engine.warm_blocks import WarmQueue

    used = set(re.findall(r"free_block_queue\.(\w+)", inspect.getsource(BlockPool)))
    assert used == {"popleft", "popleft_n", "remove", "append_n", "prepend_n", "num_free_blocks"}
    public = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")}
    # What puts in at the front, and what only looks, is vLLM's.
    assert public - set(vars(WarmQueue)) == {"prepend_n", "get_all_free_blocks", "iter_blocks_after"}
