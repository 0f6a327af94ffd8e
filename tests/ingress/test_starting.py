"""Both ingresses before there is anything behind them, and the moment at which there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
import uvicorn
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from hycluster.auth.api_key import new_key
from hycluster.client import AsyncClient
from hycluster.errors import SettingsError, Unauthenticated, Unavailable
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto.inference_pb2_grpc import InferenceStub
from hycluster.ingress.starting import StartingIngress, starting_ingress
from hycluster.pool_health import PoolHealth
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from tests.auth.keyed import keyed
from tests.ingress.stand_in import MODEL, StandInGenerator

pytestmark = pytest.mark.timeout(120)

SETTINGS = Settings(models=(Model(name=MODEL, source="/m"),), http=Http(port=0), grpc=Grpc(port=0))


Health: Any = HealthStub  # whose type stub lacks the methods


async def pools() -> Mapping[str, PoolHealth]:
    return {MODEL: PoolHealth(0, 2)}


async def names() -> list[str] | None:
    return [MODEL, "adapted"]


@pytest_asyncio.fixture
async def ingresses() -> AsyncIterator[StartingIngress]:
    async with starting_ingress(SETTINGS, pools, names) as ingresses:
        yield ingresses


@pytest_asyncio.fixture
async def channel(ingresses: StartingIngress) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ingresses.grpc.port}") as channel:
        yield channel


async def health(channel: grpc.aio.Channel) -> int:
    answer = await Health(channel).Check(health_pb2.HealthCheckRequest())
    status: int = answer.status
    return status


async def test_both_say_what_is_missing(ingresses: StartingIngress, channel: grpc.aio.Channel) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingresses.http_port}") as http:
        answer = await http.get("/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "starting", "models": {MODEL: {"replicas_ready": 0, "replicas_wanted": 2}}}
    assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
    request = pb.GenerateRequest(model=MODEL, prompt="x")
    stub = InferenceStub(channel)
    calls: list[Callable[[], Any]] = [
        lambda: stub.Generate(request),
        lambda: stub.GenerateStream(request).read(),
        lambda: stub.Tokenize(pb.TokenizeRequest(model=MODEL, prompt="x")),
        lambda: stub.CountTokens(pb.CountTokensRequest(model=MODEL, texts=["x"])),
        lambda: stub.ListModels(pb.ListModelsRequest()),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "the service is starting: 'stand-in' has 0 of 2 replicas"


async def test_nobody_waits_for_a_model_that_is_not_going_to_be_served(
    ingresses: StartingIngress, channel: grpc.aio.Channel
) -> None:
    said = "model: 'stand-on' is not served here (did you mean 'stand-in'?); served are 'stand-in', 'adapted'"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingresses.http_port}") as http:
        for answer in (
            await http.post("/v1/completions", json={"model": "stand-on", "prompt": "x"}),
            await http.get("/v1/models/stand-on"),
            await http.post("/sleep?model=stand-on"),
        ):
            assert (answer.status_code, answer.json()["error"]["message"]) == (404, said)
        for answer in (
            await http.post("/v1/completions", json={"model": "adapted", "prompt": "x"}),
            await http.post("/v1/completions", content=b"nothing", headers={"content-type": "application/json"}),
            await http.post("/v1/files", files={"file": b'{"model": "stand-on"}'}),
            await http.get("/v1/models"),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        large = await http.post(
            "/v1/completions", content=b" " * (33 << 20), headers={"content-type": "application/json"}
        )
        assert large.status_code == 413
    stub = InferenceStub(channel)
    for call in (stub.Generate(pb.GenerateRequest(model="stand-on", prompt="x")),
                 stub.Tokenize(pb.TokenizeRequest(model="stand-on", prompt="x"))):  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, said)


async def test_while_it_is_not_known_what_is_served_all_wait() -> None:
    async def nobody_knows() -> None:
        return None

    async with (
        starting_ingress(SETTINGS, pools, nobody_knows) as ingresses,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingresses.http_port}") as http,
    ):
        assert (await http.post("/v1/completions", json={"model": "stand-on"})).status_code == 503


async def test_grpc_callers_are_let_through_at_once(ingresses: StartingIngress, channel: grpc.aio.Channel) -> None:
    stub = InferenceStub(channel)
    await ingresses.hand_over(StandInGenerator())
    assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
    request = pb.GenerateRequest(model=MODEL, prompt="x")
    assert (await stub.Generate(request)).outputs[0].text
    assert [chunk async for chunk in stub.GenerateStream(request)]
    assert (await stub.Tokenize(pb.TokenizeRequest(model=MODEL, prompt="x"))).count
    assert (await stub.CountTokens(pb.CountTokensRequest(model=MODEL, texts=["x"]))).counts
    assert (await stub.ListModels(pb.ListModelsRequest())).models


async def test_the_http_port_stays_open(ingresses: StartingIngress) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingresses.http_port}") as http:
        assert (await http.get("/health")).status_code == 503
        sock = await ingresses.hand_over(StandInGenerator())
        server = uvicorn.Server(uvicorn.Config(PlainTextResponse("served"), log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        assert (await http.get("/health")).text == "served"
        server.should_exit = True
        await serving


async def test_nothing_is_left_open() -> None:
    async with starting_ingress(SETTINGS, pools, names) as ingresses:
        http, grpc_port = ingresses.http_port, ingresses.grpc.port
    again = Settings(models=SETTINGS.models, http=Http(port=http), grpc=Grpc(port=grpc_port))
    async with starting_ingress(again, pools, names) as ingresses:
        with pytest.raises(SettingsError, match=f"http.port: {http} on"):
            async with starting_ingress(again, pools, names):
                pass
        with pytest.raises(SettingsError, match=f"grpc.port: {grpc_port} on"):
            async with starting_ingress(again.model_copy(update={"http": Http(port=0)}), pools, names):
                pass


async def test_the_page_is_there_before_anything_serves() -> None:
    def page(others: ASGIApp) -> ASGIApp:
        return Router([Route("/ui", lambda _: PlainTextResponse("the page"))], default=others)

    async with (
        starting_ingress(SETTINGS, pools, names, page) as ingresses,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingresses.http_port}") as http,
    ):
        assert (await http.get("/ui")).text == "the page"
        assert (await http.get("/health")).status_code == 503


async def test_nobody_is_let_in_sooner_than_later(tmp_path: Path) -> None:
    with keyed(tmp_path) as keys:
        async with (
            starting_ingress(SETTINGS, pools, names, guard=keys.guard) as ingresses,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{ingresses.http_port}") as http,
            AsyncClient(f"127.0.0.1:{ingresses.grpc.port}", api_key=keys.key(models=["other"])) as restricted,
            AsyncClient(f"127.0.0.1:{ingresses.grpc.port}", api_key=new_key()) as stranger,
        ):
            assert (await http.get("/health")).json() == {"status": "starting"}
            assert (await http.get("/v1/models")).status_code == 401
            answer = await http.get("/v1/models", headers={"authorization": f"Bearer {keys.key()}"})
            assert (answer.status_code, MODEL in answer.text) == (503, True)
            with pytest.raises(Unauthenticated):
                await stranger.list_models()
            with pytest.raises(Unavailable) as error:
                await restricted.list_models()
            assert MODEL not in error.value.message
