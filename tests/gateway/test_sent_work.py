from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hycluster.core import GatewayWork, Priority
from hycluster.gateway.flight import Flight
from hycluster.gateway.sent_work import SentWork


def flight(
    prompt: int, cached: int | None = None, output: tuple[int, ...] = (), *, keep: bool = True, priority: int = 0
) -> Flight:
    params = SimpleNamespace(max_tokens=10)
    request: Any = SimpleNamespace(
        prompt_token_ids=[1] * prompt, sampling_params=params, priority=priority, request_id="r"
    )
    prefix: Any = SimpleNamespace(predicted_tokens=cached)
    made = Flight(request, keep=keep, output=list(output), prefix=prefix)
    made.sent("r0")
    return made


def step(work: SentWork, one: Flight, tokens: int) -> None:
    work.take(one, tokens)
    one.take([7] * tokens)


@pytest.mark.parametrize("keep", [True, False])
def test_from_its_prompt_to_its_end(keep: bool) -> None:
    work, one = SentWork(), flight(100, cached=64, keep=keep)
    work.add(one)
    assert work.told == GatewayWork(prefill_tokens=36, requests=1, decoding=0, kv_tokens=100)
    step(work, one, 1)
    step(work, one, 2)
    assert work.told == GatewayWork(prefill_tokens=0, requests=1, decoding=1, kv_tokens=103)
    work.drop(one)
    assert work.told == GatewayWork()


def test_one_that_never_begins() -> None:
    work, one, other = SentWork(), flight(100), flight(50, cached=0)
    work.add(one)
    work.add(other)
    work.drop(one)
    assert work.told == GatewayWork(prefill_tokens=50, requests=1, decoding=0, kv_tokens=50)


def test_one_that_comes_with_output() -> None:
    """From a lost replica: what it has is to prefill as well."""
    work, one = SentWork(), flight(100, cached=96, output=(1, 2, 3))
    work.add(one)
    assert work.told == GatewayWork(prefill_tokens=7, requests=1, decoding=0, kv_tokens=103)
    step(work, one, 1)
    work.drop(one)
    assert work.told == GatewayWork()


def test_rows_of_bulk_are_apart() -> None:
    work, row = SentWork(), flight(100, cached=64, priority=Priority.BATCH)
    work.add(row)
    assert work.told == GatewayWork(requests=1, kv_tokens=100, bulk_prefill_tokens=36)
    step(work, row, 1)
    assert work.told == GatewayWork(requests=1, decoding=1, kv_tokens=101)
    work.drop(row)
    assert work.told == GatewayWork()
