"""The gRPC ingress's door, over a real socket, with a stand-in for the pool behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from hycluster.auth.api_key import new_key
from hycluster.auth.caller import current_caller
from hycluster.client import KEY_VARIABLE, AsyncClient
from hycluster.core import Generation, GenerationRequest, ModelCard, Priority
from hycluster.errors import HyclusterError, PermissionDenied, Unauthenticated, Unavailable, UnknownModel
from hycluster.ingress.grpc import SERVICE, GrpcIngress, serve_grpc
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.settings.ingress import Grpc
from tests.auth.keyed import Keyed, keyed
from tests.ingress.stand_in import CARD, MODEL, StandInGenerator

pytestmark = pytest.mark.timeout(60)


class Asking(StandInGenerator):
    """Remembers who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: list[str | None] = []

    async def models(self) -> list[ModelCard]:
        return [CARD, ModelCard(name="other", max_model_len=1, ready_replicas=1)]

    async def stream(
        self, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[Generation, None]:
        caller = current_caller.get()
        self.owners.append(caller.owner if caller else None)
        async for delta in super().stream(request, deadline_s=deadline_s):
            yield delta


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path) as known:
        yield known


@pytest.fixture
def backend() -> Asking:
    return Asking()


@pytest.fixture
async def target(keys: Keyed, backend: Asking) -> AsyncIterator[str]:
    ingress: GrpcIngress = await serve_grpc(backend, Grpc(port=0), guard=keys.guard, ready_poll_s=0.02)
    try:
        yield f"127.0.0.1:{ingress.port}"
    finally:
        await ingress.stop(0)


async def test_a_key_lets_in(keys: Keyed, target: str, backend: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncClient(target, api_key=keys.key()) as client:
        assert (await client.generate(MODEL, prompt="a", max_tokens=1)).text == "w0 "
        assert [delta.outputs[0].text async for delta in client.stream(MODEL, prompt="a", max_tokens=2)] == [
            "w0 ",
            "w1 ",
        ]
        assert await client.count_tokens(MODEL, ["a b"]) == [2]
        assert [card.name for card in await client.list_models()] == [MODEL, "other"]
    monkeypatch.setenv(KEY_VARIABLE, keys.key(other=True))
    async with AsyncClient(target) as client:
        await client.generate(MODEL, prompt="a")
    assert backend.owners == ["acme/search", "acme/search", "acme/other"]


async def test_nothing_but_the_health_is_open(target: str, backend: Asking) -> None:
    async with AsyncClient(target) as client:
        assert await client.ready()
        with pytest.raises(Unauthenticated, match="API key: is missing"):
            await client.generate(MODEL, prompt="a")
        with pytest.raises(Unauthenticated):
            await anext(client.stream(MODEL, prompt="a"))
        for call in (client.tokenize(MODEL, prompt="a"), client.count_tokens(MODEL, ["a"]), client.list_models()):
            with pytest.raises(Unauthenticated):
                await call
    async with grpc.aio.insecure_channel(target) as channel:
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub
        reflection = reflect(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            ):
                pass
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert backend.requests == []


async def test_what_a_refusal_says(keys: Keyed, target: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        batch = pb.GenerateRequest(model=MODEL, prompt="a", priority=pb.BATCH)
        for request, key, code, reason, status in (
            (batch, new_key(), "UNAUTHENTICATED", "UNAUTHENTICATED", "401"),
            (batch, keys.key(), "PERMISSION_DENIED", "PERMISSION_DENIED", "403"),
            (pb.GenerateRequest(model="x", prompt="a"), keys.key(models=[MODEL]), "NOT_FOUND", "UNKNOWN_MODEL", "404"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request, metadata=[("authorization", f"Bearer {key}")])
            failed: Any = caught.value
            assert failed.code().name == code
            told = rpc_status.from_call(failed)
            assert told is not None
            info = ErrorInfo()
            assert told.details[0].Unpack(info)
            assert (info.reason, info.domain, info.metadata["http_status"]) == (reason, "hycluster", status)


async def test_scopes_and_models(keys: Keyed, target: str, backend: Asking) -> None:
    async with AsyncClient(target, api_key=keys.key(models=[MODEL])) as client:
        assert [card.name for card in await client.list_models()] == [MODEL]
        with pytest.raises(UnknownModel, match=f"'other' is not served here; served are '{MODEL}'"):
            await client.tokenize("other", prompt="a")
        with pytest.raises(PermissionDenied, match="priority: needs the scope 'batch'"):
            await client.generate(MODEL, prompt="a", priority=Priority.BATCH)
    assert backend.requests == []
    async with AsyncClient(target, api_key=keys.key("batch")) as client:
        await client.generate(MODEL, prompt="a", priority=Priority.BATCH)


async def test_others(keys: Keyed, target: str) -> None:
    key = keys.key()
    expired = keys.key(lasts_s=-1)
    for odd in [expired, key[:-1], key[4:], key + "x", "a.b.c", *(new_key() for _ in range(300))]:
        async with AsyncClient(target, api_key=odd) as client:
            with pytest.raises(Unauthenticated):
                await client.list_models()
    async with AsyncClient(target, api_key=key) as client:
        await client.list_models()
        keys.revoke_all()
        with pytest.raises(Unauthenticated):
            await client.list_models()


async def test_the_database_is_away(keys: Keyed, target: str) -> None:
    async with AsyncClient(target, api_key=keys.key()) as known, AsyncClient(target, api_key=new_key()) as strange:
        keys.file.rename(keys.file.with_suffix(".elsewhere"))
        async with asyncio.timeout(20):
            while await refusal(strange) is Unauthenticated:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await refusal(strange) is Unavailable
        await known.list_models()


async def test_refusals_are_counted(target: str) -> None:
    def count() -> float:
        labels = {"model": "", "grpc_service": SERVICE, "grpc_method": "ListModels", "grpc_code": "UNAUTHENTICATED"}
        return REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0

    before = count()
    async with AsyncClient(target) as client:
        assert await refusal(client) is Unauthenticated
    assert count() == before + 1


async def refusal(client: AsyncClient) -> type[HyclusterError]:
    """Why it is told nothing."""
    with pytest.raises(HyclusterError) as error:
        await client.list_models()
    return error.type
