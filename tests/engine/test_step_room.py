from __future__ import annotations

import itertools
import math
import random

from hycluster.engine.routed_weights import RoutedWeights
from hycluster.engine.step_room import FIRST_SEQUENCES, FIRST_TOKENS, MOST_SHARES, BulkRow, Slowdown, StepRoom
from hycluster.engine.step_time import StepTime, StepWork, prefill_pairs


def learned() -> StepTime:
    """100 ms a step, 10 ms a row, 1 ms a token of a prompt."""
    cost = StepTime()
    for _ in range(30):
        for work in (StepWork(0, 1), StepWork(0, 20), StepWork(200, 2), StepWork(10, 5)):
            cost.learn(work, 0.1 + 0.01 * work.sequences + 0.001 * work.prefill_tokens)
    return cost


def decode(number: int, lora: int = 0) -> BulkRow:
    return BulkRow(f"row-{number}", computed=50, tokens=1, lora=lora)


def test_rows_come_in_as_long_as_there_is_time() -> None:
    cost, room = learned(), StepRoom.of(0.0555, learned())
    assert [room.grant(decode(number), cost) for number in range(7)] == [1] * 5 + [0] * 2
    assert len(room.taken) == 5
    assert 0.049 < room.used_s < 0.051


def test_a_prompt_is_cut_to_what_is_left() -> None:
    cost, room = learned(), StepRoom.of(0.0605, learned())
    assert room.grant(BulkRow("prompt", 0, 200, divisible=True), cost) == 51
    assert room.grant(BulkRow("next", 0, 200, divisible=True), cost) == 0


def test_late_in_a_prompt_fewer_tokens_fit() -> None:
    """Each is held against all that are before it."""
    cost = StepTime()
    for _ in range(60):
        for tokens, computed in ((0, 0), (200, 0), (200, 10_000), (50, 5000), (100, 20_000)):
            pairs = prefill_pairs(tokens, computed)
            cost.learn(StepWork(max(0, tokens - 1), 2, 0, pairs), 0.1 + 0.001 * tokens + 2e-7 * pairs)
    fits = []
    for computed in (0, 10_000, 20_000):
        room = StepRoom.of(0.1, cost)
        fits.append(room.grant(BulkRow("prompt", computed, 200, divisible=True), cost))
        assert room.used_s <= 0.11
    assert fits == sorted(fits, reverse=True)
    assert fits[2] < 0.4 * fits[0]


def test_a_chunk_not_worth_its_row_waits() -> None:
    cost, room = learned(), StepRoom.of(0.0155, learned())
    room.others = True
    assert room.least_chunk == 10
    assert room.grant(BulkRow("prompt", 0, 200, divisible=True), cost) == 0, "5 tokens beside its last one"
    assert room.grant(BulkRow("short", 0, 5, divisible=True), cost) == 5


def test_what_cannot_be_cut_comes_whole_or_not() -> None:
    cost, room = learned(), StepRoom.of(0.0605, learned())
    room.others = True
    assert room.grant(BulkRow("prompt", 0, 200), cost) == 0
    assert room.grant(BulkRow("short", 0, 40), cost) == 40


def test_a_step_is_never_empty() -> None:
    cost = learned()
    for row in (decode(1), BulkRow("whole", 0, 200), BulkRow("prompt", 0, 200, divisible=True)):
        room = StepRoom.of(0.0, cost)
        assert room.grant(row, cost) == {"row-1": 1, "whole": 200, "prompt": 11}[row.request_id]
        assert room.grant(decode(2), cost) == 0
    beside = StepRoom(bulk_s=0.0, others=True)
    assert beside.grant(decode(1), cost) == 0


def test_it_does_not_go_far_beyond_what_it_knows() -> None:
    nothing = StepTime()
    room = StepRoom.of(math.inf, nothing)
    assert room.grant(BulkRow("prompt", 0, 500, divisible=True), nothing) == FIRST_TOKENS + 1
    assert sum(room.grant(decode(number), nothing) for number in range(20)) == FIRST_SEQUENCES - 1


def test_adapters() -> None:
    cost, room = learned(), StepRoom.of(1.0, learned())
    room.loras, room.max_loras = {7}, 2
    assert [room.grant(decode(number, lora), cost) for number, lora in enumerate((1, 2, 7, 0, 1))] == [1, 0, 1, 1, 1]


def gpu() -> StepTime:
    """16 ms a step of up to 256 tokens, 62.5 us each beyond; and 1 us a token of KV cache."""
    cost, pick = StepTime(), random.Random(5)
    for tokens, rows in itertools.product((10, 60, 120, 250, 500, 1000, 2000), (1, 4, 9) * 7):
        kv = rows * pick.randrange(1000)
        cost.learn(StepWork(tokens - rows, rows, kv), max(0.016, 6.25e-5 * tokens) + 1e-6 * kv)
    assert cost.free_tokens == 256
    return cost


def test_tokens_that_are_free_come_on_top_of_what_there_is_time_for() -> None:
    """16 ms a step of up to 256 tokens, 60 us each beyond."""
    cost = StepTime()
    for tokens, rows in itertools.product((10, 60, 120, 250, 500, 1000, 2000), (1, 4, 9) * 7):
        cost.learn(StepWork(tokens - rows, rows), max(0.016, 6.25e-5 * tokens))
    assert cost.free_tokens == 256
    room = StepRoom.of(0.0016, cost, StepWork(0, 100))
    assert room.others
    assert abs(room.grant(BulkRow("prompt", 0, 2000, divisible=True), cost) - (256 - 100 + 0.0016 / 6.25e-5)) < 5
    room = StepRoom.of(0.0016, cost, StepWork(1900, 100))
    assert room.grant(BulkRow("prompt", 0, 2000, divisible=True), cost) <= 0.0016 / 6.25e-5 + 1


def test_beside_online_work_only_tokens_that_are_free() -> None:
    cost = gpu()
    room = StepRoom.of(0.0016, cost, StepWork(0, 100), only_free=True)
    # Each reads 50 tokens of KV cache.
    assert [room.grant(decode(number), cost) for number in range(5)] == [1] * 5
    assert room.grant(BulkRow("prompt", 0, 2000, divisible=True), cost) == 256 - 105
    assert room.grant(decode(5), cost) == 0, "there is time, but nothing is free"
    assert 0.0002 < room.used_s < 0.0003
    room = StepRoom.of(0.0016, cost, StepWork(1900, 100), only_free=True)
    assert room.grant(decode(0), cost) == 0
    assert not room.taken


def test_what_rows_cost_where_their_tokens_are_free() -> None:
    cost, long = gpu(), BulkRow("long", computed=1500, tokens=1)
    room = StepRoom.of(0.0016, cost, StepWork(0, 1), only_free=True)
    assert room.grant(long, cost) == 1
    assert room.grant(long, cost) == 0, "1.5 ms for its KV cache, of 0.1"


def test_the_share_of_steps_without_free_tokens_is_added_to_the_others() -> None:
    cost, slowdown = gpu(), Slowdown(0.1)
    short, prompt = StepWork(0, 10), StepWork(510, 2)
    assert math.isclose(slowdown.may_add(short, cost), 0.1 * 0.016, rel_tol=0.01)
    for _ in range(50):
        for _ in range(4):
            slowdown.note(short, cost)
        slowdown.note(prompt, cost)
    assert math.isclose(slowdown.may_add(short, cost), 0.1 * (0.016 + 0.032 / 4), rel_tol=0.01)
    for _ in range(500):
        slowdown.note(prompt, cost)
    assert math.isclose(slowdown.may_add(short, cost), 0.1 * 0.016 * MOST_SHARES, rel_tol=0.01)
    # Where no token is free, each step bears its own.
    assert slowdown.may_add(short, learned()) == 0.1 * learned().predict(short)


EXPERTS = RoutedWeights(16, 1, 16, 1, 0.9)


def expert_gpu() -> StepTime:
    """1.7 ms a step and 15.3 ms for all experts; 256 tokens are free; and 1 us a token of KV cache."""
    cost, pick = StepTime(EXPERTS), random.Random(5)
    for tokens, rows in itertools.product((1, 3, 10, 30, 60, 120, 250, 500, 1000, 2000), (1, 4, 9) * 7):
        kv = rows * pick.randrange(1000)
        read_s = 0.0017 + 0.0153 * EXPERTS.touched(tokens)
        cost.learn(
            StepWork(tokens - min(rows, tokens), min(rows, tokens), kv), max(read_s, 6.6e-5 * tokens) + 1e-6 * kv
        )
    assert cost.free_tokens == 256
    return cost


def test_experts_that_a_row_has_read_are_paid_by_it() -> None:
    cost = expert_gpu()
    # 2 ms, where a row that is with three others reads one expert more or less: 15.3 / 16 x (15 / 16) ** 4 = 0.74 ms.
    room = StepRoom.of(0.002, cost, StepWork(0, 4), only_free=True)
    assert [room.grant(decode(number), cost) for number in range(4)] == [1, 1, 0, 0]
    room = StepRoom.of(0.002, cost, StepWork(0, 120), only_free=True)
    assert [room.grant(decode(number), cost) for number in range(18)] == [1] * 18, "all are read anyhow"
    room = StepRoom.of(0.002, cost, StepWork(0, 4), only_free=True, experts_s=0.013)
    assert [room.grant(decode(number), cost) for number in range(18)] == [1] * 18, "it was saved for"
    assert 0.006 < room.read_s < room.used_s < 0.014


def test_a_prompt_pays_for_all_experts_that_it_has_read() -> None:
    cost = expert_gpu()
    prompt = BulkRow("prompt", 0, 200, divisible=True)
    assert StepRoom.of(0.002, cost, StepWork(0, 4), only_free=True).grant(prompt, cost) == 0
    assert StepRoom.of(0.002, cost, StepWork(0, 4), only_free=True, experts_s=0.013).grant(prompt, cost) == 200


def test_what_experts_take_is_saved_for_until_all_rows_can_come_together() -> None:
    cost, slowdown = expert_gpu(), Slowdown(0.1)
    few = 4
    wanted = cost.experts_s(few + 100) - cost.experts_s(few)
    steps, opened = 400, 0
    for _ in range(steps):
        if slowdown.experts_s(few, 100, 0.0005, cost) is not None:
            opened += 1
            slowdown.spend(wanted)
    assert 0 <= steps * 0.0005 - opened * wanted < wanted
    assert 12 < opened < 25
    # One row by itself needs less, and where all are read anyhow nobody waits.
    slowdown = Slowdown(0.1)
    assert [slowdown.experts_s(few, 1, 0.0005, cost) is not None for _ in range(2)] == [False, True]
    assert Slowdown(0.1).experts_s(150, 100, 0.0005, cost) is not None
    assert Slowdown(0.1).experts_s(few, 100, 0.0005, gpu()) is not None, "a dense model"
