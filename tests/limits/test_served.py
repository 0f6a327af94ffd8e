"""Limits at both ingresses, over a simulated engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pytest
from google.rpc.error_details_pb2 import QuotaFailure, RetryInfo
from grpc_status import rpc_status

from hycluster.auth.caller import calling
from hycluster.auth.limits import BILLION, Limit
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.ledger.account import account_book
from hycluster.ledger.entry import Entry
from hycluster.limits.book import LeaseBook
from hycluster.limits.limiter import Limiter, following
from hycluster.limits.reservation import current_reservation
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import Keyed, keyed
from tests.simulated_pool import SimulatedPool

if TYPE_CHECKING:
    from hycluster.gateway.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, realtime=False)
PRICE = {"prompt_per_million_tokens": 0, "completion_per_million_tokens": 1000}


class Served:
    """Attributes: key: with the scope ``batch``. app: of all models, as batches ask it."""

    def __init__(
        self, keys: Keyed, limiter: Limiter, http: int, grpc_port: int, app: Any, generator: Generator
    ) -> None:
        self.generator = generator
        self.keys = keys
        self.key = keys.key("batch")
        self.limiter = limiter
        self.app = app
        self.http = f"http://127.0.0.1:{http}"
        self.grpc = f"127.0.0.1:{grpc_port}"

    def limit(self, limit: Limit) -> None:
        self.keys.store.set_limit(limit)
        self.keys.guard.keyring.look()  # type: ignore[union-attr]

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.http}/v1", api_key=self.key, **options)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path) as keys:
        yield keys


@contextlib.asynccontextmanager
async def serving(keys: Keyed, tiny_model: Path) -> AsyncIterator[Served]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.grpc import serve_grpc
    from hycluster.ingress.http import model_apps, over_all_models, serve_http

    book = LeaseBook(lambda: asyncio.get_running_loop().time())
    book._began_s -= 60

    async def lease(*asked: Any) -> Any:
        return book.lease(*asked)

    keyring = keys.guard.keyring
    assert keyring is not None
    model = Model(name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512}, price=PRICE)  # type: ignore[arg-type]  # pydantic reads it
    with SimulatedPool(ENGINE, 1) as pool:
        async with (
            open_gateway(model, pool.directory(model), router=Router(), admission=Admission(), wait_s=10) as gateway,
            following(Limiter(lambda: keyring.limits, lease, keyring.store)) as limiter,
        ):
            generator = Generator({model.name: gateway})
            generator.limiter = limiter
            settings = Http(port=0)
            http = await serve_http(generator, settings, guard=keys.guard, drain_timeout_s=1)
            rpc = await serve_grpc(generator, Grpc(port=0), guard=keys.guard)
            app = over_all_models(await model_apps(generator, settings), generator)
            try:
                yield Served(keys, limiter, http.port, rpc.port, app, generator)
            finally:
                await http.stop()
                await rpc.stop(1)


@pytest.fixture
async def limited(keys: Keyed, tiny_model: Path) -> AsyncIterator[Served]:
    async with serving(keys, tiny_model) as limited:
        yield limited


ASK: Any = {"model": "tiny", "prompt": "hi", "max_tokens": 4, "extra_body": {"ignore_eos": True}}


async def test_requests_by_the_minute(limited: Served) -> None:
    limited.limit(Limit("acme", "search", requests_per_minute=3))
    async with limited.openai(max_retries=0) as client:
        for left in (2, 1, 0):
            raw = await client.completions.with_raw_response.create(**ASK)
            assert raw.headers["x-ratelimit-limit-requests"] == "3"
            assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(**ASK)
        assert refused.value.code == "rate_limit_exceeded"
        headers = refused.value.response.headers
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 50_000 < int(headers["retry-after-ms"]) <= 60_000
        assert 50 < int(headers["retry-after"]) <= 60
        assert headers["x-ratelimit-reset-requests"].endswith("s")
        assert "x-should-retry" not in headers
        # Others' limit it is not.
        async with openai.AsyncOpenAI(base_url=f"{limited.http}/v1", api_key=limited.keys.key(other=True)) as other:
            await other.completions.create(**ASK)
    # The same bucket.
    async with grpc.aio.insecure_channel(limited.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        asked = pb.GenerateRequest(model="tiny", prompt="hi")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Generate(asked, metadata=(("authorization", f"Bearer {limited.key}"),))
    assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(failed.value)  # type: ignore[arg-type]
    assert status is not None
    retry, quota = RetryInfo(), QuotaFailure()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert any(detail.Unpack(quota) for detail in status.details)
    assert retry.retry_delay.seconds > 50
    assert quota.violations[0].subject == "project"


async def test_a_budget_that_is_used_up(limited: Served, keys: Keyed) -> None:
    # A token of an answer costs a thousandth; four are reserved, and the next four are too many.
    limited.limit(Limit("acme", budget_per_month=BILLION * 6 // 1000))
    async with limited.openai() as client:
        await client.completions.create(**ASK)
        with pytest.raises(openai.RateLimitError) as refused:
            await client.completions.create(**ASK)
    assert refused.value.code == refused.value.type == "insufficient_quota"
    assert refused.value.response.headers["x-should-retry"] == "false"
    await limited.limiter.exchange_counts()
    (spent,) = keys.store.spent([limited.limiter._period("budget_per_month")]).items()
    assert spent[0][:2] == ("tenant:acme", "budget_per_month")
    assert spent[1] == BILLION * 4 // 1000


async def test_what_was_reserved_and_not_used_comes_back(limited: Served) -> None:
    limited.limit(Limit("acme", tokens_per_minute=100))
    async with limited.openai(max_retries=0) as client:
        for _ in range(8):
            # Of 50 that are reserved 4 are used, and what a prompt is.
            stops = {**ASK, "max_tokens": 50, "extra_body": {"stop_token_ids": list(range(256))}}
            raw = await client.completions.with_raw_response.create(**stops)
            usage = raw.parse().usage
            assert usage is not None
            assert usage.completion_tokens == 1
            # Back by the next word with the book.
            await asyncio.sleep(0.6)
        left = int(raw.headers["x-ratelimit-remaining-tokens"])
        assert raw.headers["x-ratelimit-limit-tokens"] == "100"
        assert left < 100 - 8
        with pytest.raises(openai.RateLimitError, match="never let in") as refused:
            await client.completions.create(**{**ASK, "max_tokens": 200})
        assert refused.value.response.headers["x-should-retry"] == "false"


async def test_requests_at_a_time(limited: Served) -> None:
    limited.limit(Limit("acme", concurrent_requests=2))
    async with limited.openai() as client:
        # The client comes back when it is told to.
        await asyncio.gather(*(client.completions.create(**ASK) for _ in range(4)))


async def test_the_official_client_comes_back_when_it_is_told_to(limited: Served) -> None:
    limited.limit(Limit("acme", requests_per_minute=6000))
    slept: list[float] = []
    async with limited.openai(max_retries=3) as client:
        await client.completions.create(**ASK)
        holding = next(iter(limited.limiter._holdings.values()))
        holding._balance, holding._wait_s, holding._dry_until_s = 0, 0.7, float("inf")
        real = asyncio.sleep

        async def sleep(seconds: float, *rest: Any) -> Any:
            slept.append(seconds)
            holding._dry_until_s = float("-inf") if seconds == 0.7 else holding._dry_until_s
            return await real(min(seconds, 0.05), *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openai._base_client.anyio.sleep", sleep)
            await client.completions.create(**ASK)
    assert 0.7 in slept


async def test_without_limits_nothing_is_told(limited: Served) -> None:
    headers = {"authorization": f"Bearer {limited.key}"}
    async with httpx.AsyncClient(base_url=limited.http, headers=headers) as http:
        answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 2})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    assert not limited.limiter._holdings


async def test_who_is_over_a_limit_is_not_in_the_ledger(limited: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Entry] = []
    monkeypatch.setattr(account_book, "write_entry", written.append)
    limited.limit(Limit("acme", "search", requests_per_minute=1))
    asked = pb.GenerateRequest(model="tiny", prompt="hi", sampling=pb.Sampling(max_tokens=2))
    async with grpc.aio.insecure_channel(limited.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        await stub.Generate(asked, metadata=(("authorization", f"Bearer {limited.key}"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(asked, metadata=(("authorization", f"Bearer {limited.key}"),))
    async with limited.openai(max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(**ASK)
    assert [entry.outcome for entry in written] == ["finished"]


async def test_a_stream_that_somebody_else_closes(limited: Served) -> None:
    """As the gRPC ingress does with one that is not read: in a task, and so a context, of its own."""
    from hycluster.core import GenerationRequest, Sampling

    limited.limit(Limit("acme", "search", concurrent_requests=1))
    caller = limited.keys.guard.keyring.caller(limited.key)  # type: ignore[union-attr]
    request = GenerationRequest(model="tiny", prompt="hi", sampling=Sampling(max_tokens=400, ignore_eos=True))
    with calling(caller):
        for _ in range(3):
            stream = limited.generator.stream(request)
            await anext(stream)
            await asyncio.create_task(stream.aclose())
            assert current_reservation.get() is None
