from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from hycluster.chaos.ask import ConnectionLost, NotDone, Reading, Trace, by_grpc, by_http
from hycluster.errors import HyclusterError, Overloaded, Unavailable
from tests.chaos.answers import request
from tests.ingress.stand_in import MODEL, StandInGenerator, open_ingress

USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


def chunk(text: str, token_ids: list[int], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "token_ids": token_ids, "finish_reason": finish_reason, **more}]}


def events(*said: dict[str, Any], done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(event)}\n\n" for event in said] + ["data: [DONE]\n\n"] * done
    return httpx.Response(200, text="".join(lines))


async def asked(answer: httpx.Response | Exception, **of: Any) -> tuple[Reading, dict[str, Any]]:
    """What is read of an ingress process that answers so, and the body that it got."""
    bodies = []

    def handle(sent: httpx.Request) -> httpx.Response:
        bodies.append({"path": sent.url.path, **json.loads(sent.content)})
        if isinstance(answer, Exception):
            raise answer
        return answer

    reading = Reading(Trace())
    async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client:
        await by_http(client, "http://ingress", "m", request(**of), reading)
    return reading, bodies[0]


async def test_a_completion_over_http() -> None:
    first = chunk("a", [7], logprobs={"token_logprobs": [-0.5]})
    last = chunk("b", [8], "stop", logprobs={"token_logprobs": [-0.25]})
    reading, body = await asked(events(first, last, USAGE), logprobs=1, stop=("z",), seed=3)
    whole = reading.whole(request(logprobs=1))
    assert whole.said[0].text == "ab"
    assert whole.said[0].token_ids == (7, 8)
    assert whole.said[0].finish_reason == "stop"
    assert whole.said[0].logprobs == (-0.5, -0.25)
    assert (whole.prompt_tokens, whole.completion_tokens) == (5, 2)
    assert (body["path"], body["prompt"], body["logprobs"]) == ("/v1/completions", "hello", 1)
    assert (body["max_tokens"], body["stop"], body["seed"]) == (3, ["z"], 3)


async def test_a_chat_over_http() -> None:
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    said = {
        "choices": [
            {
                "index": 0,
                "delta": {"content": "ab"},
                "token_ids": [7, 8],
                "finish_reason": "length",
                "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
            }
        ]
    }
    reading, body = await asked(events(role, said, USAGE), chat=True, logprobs=2)
    whole = reading.whole(request(chat=True, logprobs=2))
    assert whole.said[0].token_ids == (7, 8)
    assert whole.said[0].logprobs == (-1.0, -2.0)
    assert (body["path"], body["messages"][0]["content"]) == ("/v1/chat/completions", "hello")
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


async def test_a_stream_that_does_not_say_that_it_is_whole_is_not() -> None:
    with pytest.raises(NotDone, match="without \\[DONE\\]"):
        await asked(events(chunk("a", [7], "length"), USAGE, done=False))
    reading, _ = await asked(events(chunk("a", [7], "length")))
    with pytest.raises(NotDone, match="last chunk"):
        reading.whole(request())


async def test_what_an_ingress_process_says_is_told_from_a_connection_that_is_lost() -> None:
    refused = {"error": {"message": "full", "code": 429}}
    with pytest.raises(Overloaded, match="429: full") as overloaded:
        await asked(httpx.Response(429, json=refused, headers={"retry-after": "2"}))
    assert overloaded.value.retry_after_s == 2
    with pytest.raises(Unavailable, match="503: lost") as lost:
        await asked(events(chunk("a", [7]), {"error": {"message": "lost", "code": 503}}))
    assert not isinstance(lost.value, ConnectionLost)
    with pytest.raises(HyclusterError, match="502: <html>"):
        await asked(httpx.Response(502, text="<html>"))
    with pytest.raises(ConnectionLost, match="ReadError"):
        await asked(httpx.ReadError("reset"))


async def test_grpc() -> None:
    generator = StandInGenerator()
    async with open_ingress(generator) as ingress:
        target, reading = f"127.0.0.1:{ingress.port}", Reading(trace := Trace())
        await by_grpc(target, MODEL, of := request(n=2, temperature=0.9, logprobs=1), reading)
        whole = reading.whole(of)
        assert [said.token_ids for said in whole.said] == [(0, 1, 2), (100, 101, 102)]
        assert whole.said[1].text == "w0 w1 w2 "
        assert whole.said[0].logprobs == pytest.approx((-0.1, -0.1, -0.1))
        assert whole.completion_tokens == 6
        assert [len(times) for times in trace.times_s.values()] == [3, 3]
        generator.error = Unavailable("no replica", retry_after_s=3.0)
        with pytest.raises(Unavailable, match="no replica") as said_so:
            await by_grpc(target, MODEL, request(), Reading(Trace()))
        assert not isinstance(said_so.value, ConnectionLost)
        assert said_so.value.retry_after_s == 3
    with pytest.raises(ConnectionLost):
        await by_grpc(target, MODEL, request(), Reading(Trace()))


def test_the_longest_gap_of_a_stream() -> None:
    trace = Trace(begun_s=10.0, ended_s=15.0)
    assert trace.longest_gap_s() == 5
    trace.times_s[0] += [11.0, 11.5, 12.0]
    # One of two answers goes on while the other stands still.
    trace.times_s[1] += [10.5, 14.0, 14.2]
    assert trace.longest_gap_s() == 3.5
    assert trace.longest_gap_s(after_s=13.0) == 3.5
    assert trace.longest_gap_s(after_s=14.1) == pytest.approx(0.2)
    assert trace.longest_gap_s(after_s=14.5) == 0
