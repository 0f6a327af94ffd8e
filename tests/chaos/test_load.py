from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from itertools import count

import httpx

from hycluster.chaos.load import LoadCaller, Outcome, drive, over_and_over
from hycluster.chaos.requests import Request
from tests.chaos.answers import request
from tests.waiting import PATIENCE_S

WHOLE = (
    {"choices": [{"index": 0, "text": "a", "token_ids": [1], "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}},
)


def stream(*said: object, done: bool = True) -> httpx.Response:
    return httpx.Response(200, text="".join(f"data: {json.dumps(s)}\n\n" for s in said) + "data: [DONE]\n\n" * done)


async def asked(*answers: httpx.Response | Exception, patience_s: float = PATIENCE_S) -> Outcome:
    """What becomes of a request whose attempts are answered so; the last for ever."""
    coming: Iterator[int] = count()

    def handle(_: httpx.Request) -> httpx.Response:
        answer = answers[min(next(coming), len(answers) - 1)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client:
        return await LoadCaller(client, "http://ingress", "", "m", patience_s).ask(request())


async def test_a_whole_answer() -> None:
    outcome = await asked(stream(*WHOLE))
    assert outcome.error is None
    assert outcome.answer is not None
    assert (outcome.restarts, outcome.refusals) == (0, 0)
    assert outcome.trace.begun_s <= outcome.trace.times_s[0][0] <= outcome.trace.ended_s


async def test_a_lost_connection_is_asked_again() -> None:
    outcome = await asked(httpx.ReadError("reset"), stream(*WHOLE))
    assert outcome.answer is not None
    assert outcome.restarts == 1


async def test_a_refusal_is_asked_again_when_the_ingress_process_says() -> None:
    took_s = []
    for _ in range(5):
        begun_s = time.monotonic()
        outcome = await asked(httpx.Response(503, json={}, headers={"retry-after": "0.05"}), stream(*WHOLE))
        took_s.append(time.monotonic() - begun_s)
        assert outcome.answer is not None
        assert outcome.refusals == 1
    assert 0.05 <= min(took_s) < 0.5


async def test_a_stream_that_breaks_after_its_first_token_has_failed() -> None:
    outcome = await asked(stream(WHOLE[0], {"error": {"message": "replica lost", "code": 503}}), stream(*WHOLE))
    assert outcome.answer is None
    assert outcome.error == "Unavailable: 503: replica lost"


async def test_a_stream_that_ends_early_has_failed() -> None:
    outcome = await asked(stream(*WHOLE, done=False))
    assert outcome.answer is None
    assert "without [DONE]" in str(outcome.error)


async def test_patience_ends() -> None:
    outcome = await asked(httpx.ConnectError("refused"), patience_s=0.1)
    assert outcome.error == "no whole answer after 0.1 s"
    assert outcome.trace.longest_gap_s() >= 0.1


async def test_so_many_at_a_time() -> None:
    running = most = 0

    async def ask(of: Request) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return Outcome(of)

    outcomes = await drive(ask, [request(number) for number in range(20)], 4)
    assert sorted(outcome.request.number for outcome in outcomes) == list(range(20))
    assert most == 4


def test_each_once_and_then_until_it_is_over() -> None:
    def over_after(looks: int) -> Callable[[], bool]:
        seen = count()
        return lambda: next(seen) >= looks

    three = [request(number) for number in range(3)]

    def numbers(looks: int) -> list[int]:
        return [of.number for of in over_and_over(three, over_after(looks))]

    assert numbers(0) == [0, 1, 2]
    assert numbers(3) == [0, 1, 2, 0, 1]
    assert numbers(9)[:8] == [0, 1, 2, 0, 1, 2, 0, 1]
