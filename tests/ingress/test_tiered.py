"""Service tiers at both ingresses: where a request goes in the engine's queue, and what its caller is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from hycluster.auth.caller import Caller, calling
from hycluster.core import Priority
from hycluster.errors import InvalidInput
from hycluster.gateway.tiers import FIRST, ServiceTier, placed, served_as, tier_for
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import Keyed, keyed
from tests.simulated_pool import SimulatedPool

ENGINE = Simulated(vocab_size=256, max_model_len=512, realtime=False)
ENTITLED = Caller("acme", "search", "k", scopes=frozenset({"priority"}))
OTHER = Caller("acme", "search", "k", scopes=frozenset({"batch", "admin"}))


@pytest.mark.parametrize(
    ("caller", "asked", "tier"),
    [
        (ENTITLED, "priority", "priority"),
        (ENTITLED, "auto", "default"),
        (ENTITLED, "scale", "default"),
        (OTHER, "priority", "default"),
        (None, "priority", "default"),
        (None, "flex", "flex"),
    ],
)
def test_what_a_caller_gets(caller: Caller | None, asked: str, tier: str) -> None:
    with calling(caller):
        assert tier_for(asked) == tier


@pytest.mark.parametrize("asked", ["Flex", "", 7, ["flex"], {}, True])
def test_what_is_no_tier(asked: Any) -> None:
    with pytest.raises(InvalidInput, match=r"service_tier: .* must be one of auto, default, flex, priority"):
        tier_for(asked)


@pytest.mark.parametrize(
    ("tier", "priority", "place"),
    [
        ("default", 0, 0),
        ("default", 3, 3),
        ("flex", 0, Priority.BATCH),
        ("flex", 12, 12),
        ("priority", 0, FIRST),
        # Lines of batches stay what they are.
        ("priority", Priority.BATCH, Priority.BATCH),
    ],
)
def test_where_it_goes(tier: ServiceTier, priority: int, place: int) -> None:
    with served_as(tier):
        assert placed(priority) == place
    assert placed(priority) == priority


class Served:
    """Attributes: priorities: those of the requests that engines have got."""

    def __init__(self, keys: Keyed, http: int, grpc_port: int) -> None:
        self.keys = keys
        self.priorities: list[int] = []
        self.http = f"http://127.0.0.1:{http}/v1"
        self.grpc = f"127.0.0.1:{grpc_port}"

    def client(self, *scopes: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.http, api_key=self.keys.key(*scopes), max_retries=0)


@asynccontextmanager
async def serving(keys: Keyed, tiny_model: Path) -> AsyncIterator[Served]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.grpc import serve_grpc
    from hycluster.ingress.http import serve_http

    model = Model(name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})
    with SimulatedPool(ENGINE, 1) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=10
        ) as gateway:
            generator = Generator({model.name: gateway})
            http = await serve_http(generator, Http(port=0), guard=keys.guard, drain_timeout_s=1)
            rpc = await serve_grpc(generator, Grpc(port=0), guard=keys.guard)
            served, send = Served(keys, http.port, rpc.port), gateway.engine_core.add_request_async

            async def seen(request: Any) -> None:
                served.priorities.append(request.priority)
                await send(request)

            gateway.engine_core.add_request_async = seen  # type: ignore[method-assign]
            try:
                yield served
            finally:
                await http.stop()
                await rpc.stop(1)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path) as keys:
        yield keys


@pytest.fixture
async def tiered(keys: Keyed, tiny_model: Path, vllm_imported: None) -> AsyncIterator[Served]:
    async with serving(keys, tiny_model) as served:
        yield served


MESSAGES: Any = [{"role": "user", "content": 'say "service_tier":null'}]


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_over_http(tiered: Served) -> None:
    async with tiered.client("priority") as client, tiered.client() as other:
        asks: tuple[tuple[openai.AsyncOpenAI, Any, str, int], ...] = (
            (client, "priority", "priority", FIRST), (other, "priority", "default", 0), (other, "flex", "flex", 10),
            (other, "auto", "default", 0),
        )  # fmt: skip
        for who, asked, got, place in asks:
            chat: Any = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 3, "service_tier": asked}
            assert (await who.chat.completions.create(**chat)).service_tier == got
            chunks = [chunk async for chunk in await who.chat.completions.create(**chat, stream=True)]
            assert {chunk.service_tier for chunk in chunks} == {got}
            said: Any = await who.completions.create(
                model="tiny", prompt="hi", max_tokens=3, extra_body={"service_tier": asked}
            )
            assert said.service_tier == got
            asking: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 3, "service_tier": asked}
            response = await who.responses.create(**asking)
            assert response.service_tier == got
            events: list[Any] = [event async for event in await who.responses.create(**asking, stream=True)]
            assert events[-1].response.service_tier == got
            assert tiered.priorities == [place] * 5
            tiered.priorities.clear()
        # Who asks for none is told of none.
        plain = await other.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=3)
        assert plain.service_tier is None
        with pytest.raises(openai.BadRequestError, match="service_tier"):
            await other.chat.completions.create(model="tiny", messages=MESSAGES, service_tier="best")  # type: ignore[call-overload]
        # Nor can anybody say so himself.
        with pytest.raises(openai.BadRequestError, match="priority"):
            await client.completions.create(model="tiny", prompt="hi", extra_body={"priority": FIRST})


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_by_grpc(tiered: Served) -> None:
    keys = {"mine": tiered.keys.key("priority"), "other": tiered.keys.key()}
    async with grpc.aio.insecure_channel(tiered.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(model="tiny", prompt="hi", sampling=pb.Sampling(max_tokens=3))
        for who, asked, got, place in (
            ("mine", "priority", "priority", FIRST), ("other", "priority", "default", 0), ("other", "flex", "flex", 10),
        ):  # fmt: skip
            call = stub.Generate(
                request, metadata=(("authorization", f"Bearer {keys[who]}"), ("x-service-tier", asked))
            )
            await call
            assert dict(await call.trailing_metadata())["x-service-tier"] == got
            assert tiered.priorities == [place]
            tiered.priorities.clear()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Generate(
                request, metadata=(("authorization", f"Bearer {keys['other']}"), ("x-service-tier", "best"))
            )
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
