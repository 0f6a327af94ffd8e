from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from typing import Any

import pytest

from hycluster import remote
from hycluster.batch.ask import Asker
from hycluster.client import AsyncClient
from hycluster.core import GenerationRequest, ModelCard, Priority, Sampling, StructuredOutput
from hycluster.errors import Unavailable, UnknownModel
from hycluster.remote import Remote
from tests.ingress.stand_in import MODEL
from tests.summarize.stand_in import CONTEXT_TOKENS, SummarizingGenerator


async def test_what_is_asked_comes_through(address: str, stand_in: SummarizingGenerator) -> None:
    request = GenerationRequest(
        model=MODEL,
        messages=[{"role": "user", "content": "a b"}],
        sampling=Sampling(max_tokens=2, temperature=0),
        priority=Priority.BATCH,
        request_id="r",
        session_id="s",
    )
    async with AsyncClient(address) as client:
        cluster = Remote(client, Asker(10))
        assert await cluster.models() == [ModelCard(MODEL, CONTEXT_TOKENS, 1)]
        assert await cluster.tokenize(MODEL, messages=request.messages) == [1, 1]
        assert (await cluster.generate(request)).outputs[0].text == "w0 w1 "
    assert stand_in.requests == [(request, None)]


async def test_no_field_of_a_request_stays_behind(address: str, stand_in: SummarizingGenerator) -> None:
    of_each_kind: list[dict[str, Any]] = [
        {
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "include_reasoning": False,
            "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"structured_output": StructuredOutput(regex="[a-z]+"), "job": "nightly", "session_id": "s", "request_id": "r"},
    ]
    chat: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a b"}],
        "priority": Priority.BATCH,
    }
    requests = [GenerationRequest(**chat, sampling=Sampling(max_tokens=2, n=2), **more) for more in of_each_kind]
    unset = GenerationRequest(model=MODEL, messages=chat["messages"])
    said = {of.name for of in fields(unset) for asked in requests if getattr(asked, of.name) != getattr(unset, of.name)}
    assert said | {"model", "messages", "prompt", "token_ids"} == {of.name for of in fields(unset)}
    async with AsyncClient(address) as client:
        for request in requests:
            await Remote(client, Asker(10)).generate(request)
    assert [asked for asked, _ in stand_in.requests] == [
        replace(request, request_id=asked.request_id)
        for request, (asked, _) in zip(requests, stand_in.requests, strict=True)
    ]


async def test_texts_are_counted_in_few_calls_however_long(
    address: str, stand_in: SummarizingGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "COUNTED_CHARACTERS", 10)
    calls: list[list[str]] = []
    counted = stand_in.count_tokens

    async def count(model: str, texts: list[str]) -> list[int]:
        calls.append(list(texts))
        return await counted(model, texts)

    stand_in.count_tokens = count  # type: ignore[assignment, method-assign]
    stand_in.error, stand_in.failures_left = Unavailable("no replica", retry_after_s=0.01), 1
    texts = ["a b", "", "c", "a text of 19 letters", "d e f g h", "i"]
    async with AsyncClient(address) as client:
        count_tokens = Remote(client, Asker(10)).token_counter(MODEL)
        assert await asyncio.to_thread(count_tokens, texts) == [2, 0, 1, 5, 5, 1]
        assert await asyncio.to_thread(count_tokens, []) == []
        with pytest.raises(UnknownModel):
            await asyncio.to_thread(Remote(client, Asker(10)).token_counter("other"), texts)
    assert ["a b", "c"] in calls
    assert all(sum(map(len, call)) <= 10 for call in calls)
