"""More streams at one moment than are admitted: who is let in has an answer, all others hear 429 before any of it.

vLLM's app, the gateway and both ingresses are real, the engine is simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.errors import Overloaded
from hycluster.ingress.grpc import serve_grpc
from hycluster.observe import timelines
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from hycluster.timeline import Timeline
from tests.simulated_pool import SimulatedPool
from tests.waiting import until

if TYPE_CHECKING:
    from hycluster.gateway.gateway import Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, decode_token_s=0.02)
MOST, TOKENS = 4, 40
CHAT = [{"role": "user", "content": "hello"}]
# By route: a body that asks for so many sequences.
ASKED: dict[str, tuple[dict[str, Any], int]] = {
    "/v1/chat/completions": ({"messages": CHAT, "max_completion_tokens": TOKENS, "ignore_eos": True}, 1),
    "/v1/completions": ({"prompt": ["a", "b"], "max_tokens": TOKENS, "ignore_eos": True}, 2),
    "/v1/messages": ({"messages": CHAT, "max_tokens": TOKENS}, 1),
    "/v1/responses": ({"input": "hello", "max_output_tokens": TOKENS, "store": False}, 1),
}


class Service:
    def __init__(self, http: str, grpc: str, gateway: Gateway) -> None:
        self.http = http
        self.grpc = grpc
        self.gateway = gateway

    async def settled(self) -> None:
        """Nothing is in flight, and no place is held for anybody."""
        pool = self.gateway.engine_core
        await until(lambda: not pool.requests_in_flight and not self.gateway._gate.held)


@contextlib.asynccontextmanager
async def serving(tiny_model: Path) -> AsyncIterator[Service]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import serve_http

    model = Model(name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})
    with SimulatedPool(ENGINE, 1) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(max_requests=MOST), wait_s=60
        ) as gateway:
            generator = Generator({model.name: gateway})
            http = await serve_http(generator, Http(port=0), drain_timeout_s=1)
            by_grpc = await serve_grpc(generator, Grpc(port=0))
            try:
                yield Service(f"http://127.0.0.1:{http.port}", f"127.0.0.1:{by_grpc.port}", gateway)
            finally:
                await http.stop()
                await by_grpc.stop(1)


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> int:
    """Its status; an answer that has begun is whole."""
    async with client.stream("POST", path, json={"model": "tiny", "stream": True, **body}) as answer:
        text = (await answer.aread()).decode()
        if answer.status_code == 200:
            assert '"error"' not in text.replace('"error":null', "")
            assert any(end in text for end in ("[DONE]", "message_stop", "response.incomplete", "response.completed"))
        else:
            assert "at most 4 are admitted" in text
            assert int(answer.headers.get("retry-after", "0")) >= 1, (path, text, answer.headers)
        return answer.status_code


async def test_who_is_let_in_has_an_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Timeline] = []
    monkeypatch.setattr(timelines.recorder, "ended", [ended.append])
    async with serving(tiny_model) as service:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.http, timeout=60, limits=limits) as client:
            for path, (body, sequences) in ASKED.items():
                ended.clear()
                refused = service.gateway.traffic.online.refused["overloaded"]
                heard = Counter(await asyncio.gather(*(stream(client, path, body) for _ in range(20))))
                await service.settled()
                assert set(heard) == {200, 429}, path
                # Some ended before others had come.
                assert heard[200] >= MOST // sequences, path
                # All views say the same.
                assert service.gateway.traffic.online.refused["overloaded"] - refused == heard[429], path
                assert Counter(each.status for each in ended) == {"ok": heard[200], "failed": heard[429]}, path
                why = {each.error for each in ended}
                assert why == {"", "Overloaded: model: 'tiny' has 4 requests in flight; at most 4 are admitted"}, path

        async def call(client: AsyncClient) -> str:
            sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
            try:
                chunks = [chunk async for chunk in client.stream("tiny", prompt="hello", sampling=sampling)]
            except Overloaded as error:
                return error.message
            assert chunks[-1].usage is not None
            return "answered"

        async with AsyncClient(service.grpc) as by_grpc:
            said = Counter(await asyncio.gather(*(call(by_grpc) for _ in range(20))))
        assert set(said) == {"answered", "model: 'tiny' has 4 requests in flight; at most 4 are admitted"}
        await service.settled()


async def test_what_is_refused_later_or_left_holds_nothing(tiny_model: Path) -> None:
    async with serving(tiny_model) as service, httpx.AsyncClient(base_url=service.http, timeout=60) as client:
        # Let in, and then found to be too long.
        for _ in range(3 * MOST):
            answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 600})
            assert answer.status_code == 400
        await service.settled()
        asking = [asyncio.create_task(stream(client, *leaving)) for leaving in _bodies(2 * MOST)]
        await until(lambda: service.gateway.engine_core.requests_in_flight == MOST)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await service.settled()


@pytest.mark.parametrize("streamed", [False, True])
async def test_who_leaves_is_said_to_have_left(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """In whatever moment, and in every view; a stop string is no loss."""
    ended: list[Timeline] = []
    monkeypatch.setattr(timelines.recorder, "ended", [ended.append])
    async with serving(tiny_model) as service, httpx.AsyncClient(base_url=service.http, timeout=60) as client:
        traffic = service.gateway.traffic.online
        for path, (body, sequences) in ASKED.items():
            ended.clear()
            before = traffic.cancelled
            asked = {"model": "tiny", "stream": streamed, **body}
            asking = asyncio.create_task(client.post(path, json=asked, headers={"x-request-id": "leaves"}))
            await until(lambda: service.gateway.engine_core.requests_in_flight)
            await until(lambda: not service.gateway._gate.held)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: ended)
            assert [each.status for each in ended] == ["cancelled"], path
            await service.settled()
            assert traffic.cancelled == before + sequences, path
        page = (await client.get("/metrics")).text
        if not streamed:
            for path in ASKED:
                assert re.search(rf'http_requests_total{{.*handler="{path}".*status="499"}} [1-9]', page), path
        # Let in, and left before any engine was asked.
        gone = traffic.cancelled
        rendering, go_on = asyncio.Event(), asyncio.Event()
        real = service.gateway.add_request

        async def slow(*asked: Any, **named: Any) -> Any:
            rendering.set()
            await go_on.wait()
            return await real(*asked, **named)

        monkeypatch.setattr(service.gateway, "add_request", slow)
        body = {"model": "tiny", "prompt": "hello", "max_tokens": TOKENS, "stream": streamed}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await rendering.wait()
        assert service.gateway._gate.held == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: traffic.cancelled == gone + 1)
        await service.settled()
        monkeypatch.setattr(service.gateway, "add_request", real)
        ended.clear()
        stopped = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "stop": list("ea1 "), "ignore_eos": True}
        assert (await client.post("/v1/completions", json=stopped)).json()["choices"][0]["finish_reason"] == "stop"
        assert [(each.status, each.error) for each in ended] == [("ok", "")]


def _bodies(number: int) -> list[tuple[str, dict[str, Any]]]:
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
    return [("/v1/completions", body)] * number
