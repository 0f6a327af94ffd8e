"""What goes past the layers of FastAPI and Starlette is answered as it would be with them.

vLLM's app and the gateway are real, the engine is simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import httpx
import pytest
from fastapi import FastAPI

from hycluster.core import MAX_TOOLS
from hycluster.errors import Overloaded
from hycluster.settings.ingress import Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedPool
from tests.waiting import until

if TYPE_CHECKING:
    from hycluster.gateway.gateway import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, step_base_s=0.01, decode_token_s=0.0005)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TURN = [{"role": "user", "content": "hello"}]
# Of an answer what is drawn anew for each, and what only a page of another origin needs.
DRAWN = re.compile(r'"(id|created)":\s?("[^"]*"|\d+)')
OWN_HEADERS = {"date", "x-request-id", "vary", "content-length"}


def body(**fields: Any) -> bytes:
    most = "max_completion_tokens" if "messages" in fields else "max_tokens"
    return json.dumps({most: 5, "ignore_eos": True, "temperature": 0} | fields).encode()


def prompt(**fields: Any) -> tuple[str, bytes, dict[str, str]]:
    return COMPLETIONS, body(prompt="hello", **fields), JSON


def chat(**fields: Any) -> tuple[str, bytes, dict[str, str]]:
    return CHAT, body(messages=TURN, **fields), JSON


# What is answered past the layers.
RIGHT = {
    "completion": prompt(),
    "its-stream": prompt(stream=True, stream_options={"include_usage": True}),
    "several": (COMPLETIONS, body(prompt=["a", "b"], n=2, temperature=1, seed=1), JSON),
    "echo": prompt(echo=True),
    "unknown-field": prompt(guided_json={"type": "object"}, never_heard_of="x"),
    "charset": (*prompt()[:2], {"content-type": "application/json; charset=utf-8"}),
    "named": prompt(model="tiny"),
    "tier": prompt(service_tier="flex", stream=True),
    "chat": chat(),
    "chat-stream": chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    "tools": chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], tool_choice="none"),
}
# What is refused: by the model's app, by the handler or by the gateway; or asked in an uncommon way.
WRONG: dict[str, tuple[str, bytes, Any]] = {
    "no-json": (COMPLETIONS, b'{"prompt": ', JSON),
    "no-object": (COMPLETIONS, b"[1]", JSON),
    "empty": (COMPLETIONS, b"", JSON),
    "not-utf-8": (COMPLETIONS, b'{"prompt": "\xff"}', JSON),
    "nested": (COMPLETIONS, b'{"prompt": ' + b"[" * 3000, JSON),
    "no-kind": (*prompt()[:2], {}),
    "other-kind": (*prompt()[:2], {"content-type": "text/plain"}),
    "two-kinds": (*prompt()[:2], [("content-type", "text/plain"), *JSON.items()]),
    "capitals": (*prompt()[:2], {"content-type": "Application/JSON"}),
    "from-a-page": (*prompt()[:2], JSON | {"origin": "https://example.org"}),
    "wrong-type": prompt(max_tokens="many"),
    "no-messages": (CHAT, body(), JSON),
    "too-many-tools": chat(tools=[{"type": "function", "function": {"name": "f"}}] * (MAX_TOOLS + 1)),
    "over-the-top": prompt(temperature=9),
    "too-long": (COMPLETIONS, body(prompt="x" * 600), JSON),
    "too-long-stream": (CHAT, body(messages=[{"role": "user", "content": "x" * 600}], stream=True), JSON),
    "no-stream": prompt(stream_options={"include_usage": True}),
    "no-model": prompt(model="no-such-model"),
    "no-template": (CHAT, body(messages=[{"role": "user"}], chat_template="{{ raise_exception('no') }}"), JSON),
}  # fmt: skip


class Ingress:
    def __init__(self, client: httpx.AsyncClient, gateway: Gateway) -> None:
        self.client = client
        self.gateway = gateway


@contextlib.asynccontextmanager
async def serving(model: Model, pool: SimulatedPool, *, short: bool) -> AsyncIterator[Ingress]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import serve_http

    async with open_gateway(model, pool.directory(model), router=Router(), admission=Admission(), wait_s=60) as gateway:
        whole = mock.patch("hycluster.ingress.http.FastPath", lambda app: app)
        with contextlib.nullcontext() if short else whole:
            http = await serve_http(Generator({model.name: gateway}), Http(port=0), drain_timeout_s=1)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=60) as client:
                yield Ingress(client, gateway)
        finally:
            await http.stop()


@contextlib.asynccontextmanager
async def both(tiny_model: Path) -> AsyncIterator[tuple[Ingress, Ingress]]:
    """One ingress with the fast path, and one without."""
    model = Model(name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})
    with SimulatedPool(ENGINE, 1) as pool:
        async with serving(model, pool, short=True) as short, serving(model, pool, short=False) as whole:
            yield short, whole


def told(answer: httpx.Response) -> tuple[int, dict[str, str], object]:
    headers = {name: value for name, value in answer.headers.items() if name not in OWN_HEADERS}
    text = DRAWN.sub(r'"\1": 0', answer.text)
    return answer.status_code, headers, joined(text) if text.startswith("data: ") else text


def joined(stream: str) -> object:
    """How many tokens come with an event goes by how busy the machine is."""
    *events, done = stream.strip().split("\n\n")
    texts, rest = list[str](), list[object]()
    for event in events:
        told: dict[str, Any] = json.loads(event.removeprefix("data: "))
        for choice in told["choices"]:
            part = choice.get("delta", choice)
            texts.append(part.pop("content", None) or part.pop("text", None) or "")
        if told["choices"]:
            told.pop("usage", None)
        if told not in rest:
            rest.append(told)
    return done, "".join(texts), rest


@contextlib.contextmanager
def counting_layers() -> Any:
    """Requests that go through FastAPI's."""
    asked, through = list[str](), FastAPI.__call__

    async def counted(app: FastAPI, scope: Any, *rest: Any) -> None:
        asked.append(scope["path"])
        await through(app, scope, *rest)

    with mock.patch.object(FastAPI, "__call__", counted):
        yield asked


async def test_answers_are_those_of_the_whole_way(tiny_model: Path) -> None:
    async with both(tiny_model) as (short, whole):
        for name, (path, content, headers) in (RIGHT | WRONG).items():
            with counting_layers() as asked:
                first = await short.client.post(path, content=content, headers=headers)
            second = await whole.client.post(path, content=content, headers=headers)
            assert told(first) == told(second), name
            assert (first.status_code == 200) == (name not in WRONG or name in {"capitals", "from-a-page"}), name
            if name in RIGHT:
                assert not asked, name


async def test_what_a_handler_raises_is_answered_by_the_app(tiny_model: Path) -> None:
    from hycluster.ingress.fast_path import _Handled

    async with both(tiny_model) as (short, _):
        for error, status in ((Overloaded("full", retry_after_s=3), 429), (KeyError("role"), 400), (OSError(), 500)):
            with mock.patch.object(_Handled, "ask", side_effect=error):
                answer = await short.client.post(COMPLETIONS, content=body(prompt="hello"), headers=JSON)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == status
            assert ("retry-after" in answer.headers) == (status == 429)


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_leaves_leaves_nothing_behind(tiny_model: Path, streamed: bool) -> None:
    async with both(tiny_model) as (short, _):
        pool = short.gateway.engine_core
        content = body(prompt="hello", max_tokens=480, stream=streamed)
        asking = asyncio.create_task(short.client.post(COMPLETIONS, content=content, headers=JSON))
        await until(lambda: pool.requests_in_flight == 1)
        asking.cancel()
        await until(lambda: not pool.requests_in_flight)
        # Long before the answer would have been whole.
        assert asking.cancelled()
        assert (await short.client.post(COMPLETIONS, content=body(prompt="hello"), headers=JSON)).status_code == 200
