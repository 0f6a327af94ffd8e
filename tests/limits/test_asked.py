"""What a request over HTTP is reserved for, and that it is settled, however it is written and ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.auth.caller import calling
from hycluster.auth.limits import Limit
from hycluster.limits.reservation import RequestTokens, current_reservation
from tests.limits.virtual import ME, World, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

EXPECTED, MOST = 20, 512
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


def gateway(name: str = "m") -> Any:
    scaling = SimpleNamespace(expected_output_tokens=EXPECTED)
    model = SimpleNamespace(name=name, autoscaling=scaling, price=None)
    return SimpleNamespace(model=model, model_config=SimpleNamespace(max_model_len=MOST))


@pytest.mark.parametrize(
    ("path", "body", "completion"),
    [
        (COMPLETIONS, {"prompt": "hi"}, EXPECTED),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 7, "n": 3}, 21),
        # One for each prompt.
        (COMPLETIONS, {"prompt": ["hi", "ho", "he"], "max_tokens": 7, "n": 2}, 42),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "max_tokens": 7}, 14),
        (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 7}, 7),
        (COMPLETIONS, {"prompt": "hi", "prompt_embeds": ["a", "b"], "max_tokens": 7}, 21),
        (COMPLETIONS, {"prompt": []}, EXPECTED),
        # As vLLM reads them.
        (COMPLETIONS, {"prompt": "hi", "max_tokens": "300", "n": "2"}, 600),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 300.0, "n": 2.0}, 600),
        # What the route does not read says nothing.
        (COMPLETIONS, {"prompt": "hi", "max_completion_tokens": 1, "max_tokens": 300}, 300),
        (COMPLETIONS, {"prompt": "hi", "max_output_tokens": 1}, EXPECTED),
        (CHAT, {"messages": [], "max_output_tokens": 1, "max_completion_tokens": 300}, 300),
        (CHAT, {"messages": [], "max_tokens": 30}, 30),
        (RESPONSES, {"input": "hi", "max_tokens": 1, "max_output_tokens": 300}, 300),
        (MESSAGES, {"messages": [], "max_completion_tokens": 1, "max_tokens": 300}, 300),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 300, "n": 16_000}, 300 * 16_000),
        # What is none is refused behind this.
        (COMPLETIONS, {"prompt": "hi", "max_tokens": -5, "n": -5}, EXPECTED),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": "inf", "n": "nan"}, EXPECTED),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": [1], "n": {}}, EXPECTED),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 10**4000, "n": 1}, MOST),
    ],
)  # fmt: skip
def test_what_an_answer_may_be(path: str, body: dict[str, Any], completion: int) -> None:
    from hycluster.ingress.limited import _expected, _read

    assert _expected(gateway(), path, _read(json.dumps(body).encode()))[0].completion == completion


def test_a_number_that_is_too_long_to_be_told() -> None:
    from hycluster.ingress.limited import _expected, _read

    expected, _ = _expected(gateway(), COMPLETIONS, _read(json.dumps({"prompt": "hi", "n": 10**4299}).encode()))
    assert len(str(expected.completion)) < 20


@pytest.mark.parametrize("name", ["input", "query", "documents", "text_1", "queries", "items", "data_1"])
def test_prompts_of_what_does_not_generate(name: str) -> None:
    from hycluster.ingress.limited import _expected, _read

    texts = ["word " * 4000, "word " * 4000]
    expected, _ = _expected(gateway(), "/v1/score", _read(json.dumps({name: texts}).encode()))
    assert expected.prompt > 9000


async def post(app: ASGIApp, path: str, body: bytes, query: bytes = b"") -> int:
    status, sent = 0, [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return sent.pop() if sent else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    scope: Scope = {
        "type": "http", "method": "POST", "path": path, "query_string": query, "headers": [],
    }  # fmt: skip
    with calling(ME):
        await app(scope, receive, send)
    return status


def limited(app: ASGIApp, world: World, *models: str) -> Any:
    from hycluster.ingress.limited import Limited

    gateways = {name: gateway(name) for name in models}
    generator: Any = SimpleNamespace(
        limiter=world.process().limiter, gateways=gateways, model_of=lambda name: name if name in gateways else None
    )
    return Limited(app, generator)


def test_a_model_that_is_named_by_the_query_has_its_limits() -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({})(scope, receive, send)

    async def main() -> list[int]:
        app = limited(answer, World(Limit("acme", model="dear", requests_per_minute=1)), "cheap", "dear")
        body = json.dumps({"prompt": "hi"}).encode()
        asked = [(b"model=dear", body), (b"model=dear", body), (b"model=cheap", body), (b"", body)]
        return [await post(app, COMPLETIONS, body, query) for query, body in asked]

    assert run(main()) == [200, 429, 200, 200]


@pytest.mark.parametrize("pools", [False, True])
def test_what_comes_is_counted_and_passed_on(pools: bool) -> None:
    from vllm.outputs import CompletionOutput, PoolingOutput, PoolingRequestOutput, RequestOutput

    from hycluster.gateway.limited import metered

    def step(index: int, tokens: list[int], prompt: list[int] | None) -> RequestOutput:
        said = CompletionOutput(index, "", tokens, None, None)
        return RequestOutput("r", None, prompt, None, [said], finished=False, num_cached_tokens=2)

    whole: Any = PoolingRequestOutput("r", PoolingOutput(torch.zeros(3)), [1, 2, 3], 2, True)
    steps = [whole] if pools else [step(0, [4], [1, 2, 3]), step(1, [5, 6], None), step(0, [7], None)]

    async def outputs() -> AsyncIterator[Any]:
        for each in steps:
            yield each

    async def main() -> tuple[list[Any], RequestTokens]:
        world = World(Limit("acme", tokens_per_minute=1000))
        reservation = await world.process().limiter.reserve([*world.limits], RequestTokens(10, 0, 10))
        passed = [output async for output in metered(outputs(), reservation)]  # type: ignore[arg-type]
        return passed, reservation.tokens

    assert run(main()) == (steps, RequestTokens(3, 2, 0 if pools else 4))


def test_who_leaves_before_a_whole_answer_has_used_what_was_reserved() -> None:
    from hycluster.gateway.limited import metered

    async def nothing_yet() -> AsyncIterator[Any]:
        await asyncio.sleep(3600)
        yield None

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        reservation = current_reservation.get()
        assert reservation is not None

        async def handle() -> None:
            async for _ in metered(nothing_yet(), reservation):  # type: ignore[arg-type]
                pass

        # As vLLM's app does it when its caller has left: it does not wait for what it cancels.
        handling = asyncio.create_task(handle())
        await asyncio.sleep(1)
        handling.cancel()
        await JSONResponse(None)(scope, receive, send)

    async def main() -> list[int]:
        app = limited(answer, World(Limit("acme", tokens_per_minute=1000)), "m")
        statuses = []
        for _ in range(3):
            statuses.append(await post(app, COMPLETIONS, json.dumps({"prompt": "hi", "max_tokens": 400}).encode()))
            await asyncio.sleep(2)
        return statuses

    assert run(main()) == [200, 200, 429]
