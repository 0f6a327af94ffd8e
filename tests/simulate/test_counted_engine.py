from __future__ import annotations

import math
from typing import Any

import pytest

from hycluster.simulate.counted_engine import CountedEngine, CountedRow, CountedSizes
from hycluster.simulate.step_work import LinearStep

BASE, TOKEN, ROW = 0.01, 1e-5, 1e-4


def engine(**changed: Any) -> CountedEngine:
    sizes = {"step_tokens": 1000, "step_rows": 8, "kv_tokens": 100_000, "block_tokens": 16, "asynchronous": False}
    return CountedEngine(
        CountedSizes(**{**sizes, **changed}), LinearStep(BASE, TOKEN, ROW), lambda _: None, lambda _: None
    )


def row(number: int, prompt: int, output: int, at_s: float = 0.0, blocks: tuple[int, ...] = ()) -> CountedRow:
    return CountedRow(number, prompt, output, blocks, at_s, float(prompt))


def play(engine: CountedEngine, *rows: CountedRow) -> dict[int, tuple[float, float]]:
    """When each got its first token and its last one."""
    first, last = dict[int, float](), dict[int, float]()
    coming = list(rows)
    while coming or engine.next_s < math.inf:
        if coming and coming[0].arrival_s <= engine.next_s:
            engine.add(coming[0], coming[0].arrival_s)
            coming.pop(0)
            continue
        now_s = engine.next_s
        begun, over = engine.finish_step()
        first |= {each.number: now_s for each in begun}
        last |= {each.number: now_s for each in over}
    assert engine.columns()[:5] == (0, 0, 0, 0, 0), "nothing is left"
    return {number: (first[number], last[number]) for number in first}


def test_a_prompt_is_computed_in_chunks_and_an_output_in_one_jump() -> None:
    one = engine()
    (first, last) = play(one, row(0, 1500, 11))[0]
    assert first == pytest.approx(2 * (BASE + ROW) + 1498 * TOKEN)
    assert last - first == pytest.approx(10 * (BASE + ROW))
    assert one.steps == 12
    assert one.busy_s == pytest.approx(last)


def test_who_comes_waits_for_the_step_that_is_computed() -> None:
    """With async scheduling for the one behind it as well."""
    step = BASE + ROW
    for asynchronous, steps in ((False, 4), (True, 5)):
        found = play(engine(asynchronous=asynchronous), row(0, 16, 100), row(1, 1, 2, at_s=2.5 * step))
        # Its first token comes from a step that has both rows.
        assert found[1][0] == pytest.approx(steps * step + 15 * TOKEN + ROW, abs=1e-9)


def test_rows_that_decode_leave_a_prompt_less_room() -> None:
    found = play(engine(step_tokens=10), row(0, 10, 100), row(1, 18, 1, at_s=0.001))
    # The first one's row takes one of ten tokens.
    assert found[1][0] == pytest.approx(found[0][0] + 2 * (BASE + 2 * ROW) + 16 * TOKEN)


def test_only_so_many_rows_are_in_a_step() -> None:
    found = play(engine(step_rows=1), row(0, 16, 5), row(1, 16, 5))
    assert found[1][0] > found[0][1]


def test_where_the_cache_is_full_who_comes_waits() -> None:
    found = play(engine(kv_tokens=2048), row(0, 1500, 5), row(1, 1500, 5))
    assert found[1][0] > found[0][1]


def test_a_prefix_that_is_there_is_not_computed() -> None:
    rows = [row(0, 1025, 1, blocks=(1, 2)), row(1, 1025, 1, at_s=1.0, blocks=(1, 2))]
    found = play(engine(step_tokens=4000), *rows)
    assert [each.cached for each in rows] == [0, 1024]
    assert found[1][0] - 1.0 == pytest.approx(BASE + ROW)


def test_of_a_prompt_that_is_there_whole_the_last_block_is_computed() -> None:
    rows = [row(0, 1024, 1, blocks=(1, 2)), row(1, 1024, 1, at_s=1.0, blocks=(1, 2))]
    play(engine(), *rows)
    assert rows[1].cached == 1024 - 16


def test_what_it_says_of_itself() -> None:
    one = engine()
    one.add(row(0, 1500, 11), 0.0)
    outstanding, requests, prefill, decoding, kv_tokens, begun_s, pace, prefill_pace = one.columns()
    assert (outstanding, requests, prefill, decoding, kv_tokens) == (1511, 1, 1500, 0, 1500)
    assert (begun_s, pace) == (0.0, 0.0)
    assert prefill_pace * one.next_s == pytest.approx(1000)
    one.finish_step()
    assert one.columns()[:3] == (1511, 1, 500)
    one.finish_step()
    assert one.columns()[:5] == (10, 1, 0, 1, 1500)
    assert one.columns()[6] == pytest.approx(1 / (BASE + ROW))
