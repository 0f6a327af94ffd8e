"""Each answer of an ingress process, by every route and by gRPC, against its line in the ledger, which is there before
the answer's end is. vLLM's app, the gateway and both ingresses are real, the engine is simulated."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.errors import HyclusterError
from hycluster.ledger.books import books_of
from hycluster.ledger.entry import Entry, entries_in
from hycluster.ledger.keeper import open_ledger
from hycluster.ledger.usage import sum_usage
from hycluster.settings.auth import Auth
from hycluster.settings.ingress import Batches, Grpc, Http, Responses
from hycluster.settings.ledger import Ledger
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.price import Price
from hycluster.settings.settings import Settings
from hycluster.settings.simulated import Simulated
from tests.auth.keyed import Keyed, keyed
from tests.simulated_pool import SimulatedPool
from tests.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

TINY = "tiny"
ENGINE = Simulated(vocab_size=256, max_model_len=512, step_base_s=0.001)
PRICE = Price(prompt_per_million_tokens=Decimal(1), completion_per_million_tokens=Decimal("2.5"))
CHAT = [{"role": "user", "content": "hello"}]
FORCED = {"ignore_eos": True, "temperature": 0}


class Service:
    """An ingress process's parts.

    Attributes:
        key: lets in.
    """

    def __init__(self, settings: Settings, http: str, grpc_address: str, keys: Keyed, pool: SimulatedPool) -> None:
        self.settings = settings
        self.http = http
        self.grpc = grpc_address
        self.pool = pool
        self.key = keys.key("batch")

    def entries(self) -> list[Entry]:
        books = books_of(self.settings)
        assert books is not None
        assert books.journals is not None
        return [entry for file in books.journals.glob("*.jsonl") for entry in entries_in(file.read_bytes())]

    def entry(self, request_id: str) -> Entry:
        (found,) = [entry for entry in self.entries() if entry.request_id == request_id]
        return found


@contextlib.asynccontextmanager
async def serving(folder: Path, tiny_model: Path) -> AsyncIterator[Service]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.grpc import serve_grpc
    from hycluster.ingress.http import serve_http
    from hycluster.responses.process import ServedResponses

    model = Model(name=TINY, source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512}, price=PRICE)
    settings = Settings(
        models=(model,),
        auth=Auth(enabled=True),
        batches=Batches(store=str(folder / "batches")),
        responses=Responses(poll_s=0.05),
        ledger=Ledger(cut_every_s=3600),
    )
    responses = ServedResponses(settings)
    with keyed(folder) as keys, SimulatedPool(ENGINE, 1) as pool:
        async with (
            open_ledger(settings) as keeper,
            open_gateway(
                model, pool.directory(model), router=Router(), admission=Admission(max_requests=8), wait_s=10
            ) as gateway,
        ):
            assert keeper is not None
            generator = Generator({TINY: gateway})
            http = await serve_http(
                generator, Http(port=0), guard=keys.guard, before_models=responses.before, drain_timeout_s=1
            )
            by_grpc = await serve_grpc(generator, Grpc(port=0), guard=keys.guard)
            try:
                yield Service(settings, f"http://127.0.0.1:{http.port}", f"127.0.0.1:{by_grpc.port}", keys, pool)
            finally:
                await responses.close(0)
                await http.stop()
                await by_grpc.stop(1)


def of_usage(told: dict[str, Any]) -> tuple[int, int]:
    return (
        told["prompt_tokens"] if "prompt_tokens" in told else told["input_tokens"],
        told["completion_tokens"] if "completion_tokens" in told else told["output_tokens"],
    )


def usage_in(events: list[dict[str, Any]]) -> tuple[int, int]:
    """Of a stream's events, whichever API's."""
    inp, out = 0, 0
    for event in events:
        told = (
            event.get("usage")
            or (event.get("response") or {}).get("usage")
            or (event.get("message") or {}).get("usage")
        )
        if told:
            found = of_usage({"input_tokens": 0, "output_tokens": 0} | told if "prompt_tokens" not in told else told)
            inp, out = max(inp, found[0]), max(out, found[1])
    return inp, out


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 7, **FORCED}),
    "chat-n": ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 5, "n": 3, "ignore_eos": True}),
    "completion": ("/v1/completions", {"prompt": "hello", "max_tokens": 9, **FORCED}),
    "completions": ("/v1/completions", {"prompt": ["a", "bcd", "ef"], "max_tokens": 4, "n": 2, "ignore_eos": True}),
    "stopped": ("/v1/completions", {"prompt": "hello", "max_tokens": 200, "stop": ["e", "a", "1", " "], **FORCED}),
    "response": ("/v1/responses", {"input": "hello", "max_output_tokens": 6, "temperature": 0, "store": False}),
    "stored": ("/v1/responses", {"input": "hello", "max_output_tokens": 6, "temperature": 0}),
    "message": ("/v1/messages", {"messages": CHAT, "max_tokens": 6}),
}


async def test_every_answer_is_in_the_ledger_to_the_token(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path / "home"))
    async with serving(tmp_path, tiny_model) as service:
        async with httpx.AsyncClient(
            base_url=service.http, headers={"authorization": f"Bearer {service.key}"}, timeout=30
        ) as http:
            answers = await by_http(service, http)
            await what_was_refused_is_known_by_that(service, http)
            await who_leaves_has_had_what_came(service, http)
            await what_is_answered_in_the_background(service, http)
        answers += await by_grpc(service)
        said = [entry for entry in service.entries() if entry.outcome == "finished" and not entry.once]
        assert Counter((entry.input_tokens, entry.output_tokens) for entry in said) == answers
        entries = service.entries()
    # It has stopped: all is committed, and says the same.
    books = books_of(service.settings)
    assert books is not None
    assert books.journals is not None
    assert list(books.journals.glob("*.jsonl")) == []
    (found,) = sum_usage(books, ["tenant", "project"])
    assert found.group == {"tenant": "acme", "project": "search"}
    assert found.requests == sum(entry.requests for entry in entries)
    assert found.output_tokens == sum(entry.output_tokens for entry in entries)
    assert found.cost == Decimal(found.input_tokens + Decimal("2.5") * found.output_tokens) / 1_000_000


async def by_http(service: Service, http: httpx.AsyncClient) -> Counter[tuple[int, int]]:
    answers = Counter[tuple[int, int]]()
    for name, (path, body) in ASKED.items():
        headers = {"x-request-id": f"whole-{name}"}
        answer = await http.post(path, json={"model": TINY, **body}, headers=headers)
        assert answer.status_code == 200, (name, answer.text)
        told = of_usage(answer.json()["usage"])
        entry = service.entry(f"whole-{name}")
        assert (entry.input_tokens, entry.output_tokens) == told, name
        assert (entry.tenant, entry.project, entry.key_name, entry.model) == ("acme", "search", "test", TINY)
        assert (entry.operation, entry.tier, entry.outcome) == (f"POST {path}", "online", "finished")
        assert entry.key.startswith("key_")
        assert 0 < entry.started_at < entry.ended_at
        answers[told] += 1
        answers[await streamed(service, http, name, path, body)] += 1
    return answers


async def streamed(
    service: Service, http: httpx.AsyncClient, name: str, path: str, body: dict[str, Any]
) -> tuple[int, int]:
    """The line is there before the last token is, which is before the end of the stream."""
    asked: dict[str, Any] = {"model": TINY, "stream": True, **body}
    if path.endswith("completions"):
        asked["stream_options"] = {"include_usage": True}
    events: list[dict[str, Any]] = []
    async with http.stream("POST", path, json=asked, headers={"x-request-id": f"stream-{name}"}) as answer:
        assert answer.status_code == 200, name
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            events.append(json.loads(line[6:]))
            if usage_in([events[-1]])[1] and len(events) > 2:
                service.entry(f"stream-{name}")
    told = usage_in(events)
    entry = service.entry(f"stream-{name}")
    assert (entry.input_tokens, entry.output_tokens, entry.outcome) == (*told, "finished"), name
    return told


async def what_was_refused_is_known_by_that(service: Service, http: httpx.AsyncClient) -> None:
    before = service.entries()
    answer = await http.post("/v1/completions", json={"model": TINY, "prompt": "x"}, headers={"authorization": "x"})
    assert answer.status_code == 401
    for body in ({"prompt": 7}, {"prompt": "x", "model": "other"}):
        answer = await http.post("/v1/completions", json={"model": TINY, **body})
        assert answer.status_code in (400, 404), answer.text
    assert service.entries() == before
    # Admitted, and then too long.
    answer = await http.post("/v1/completions", json={"model": TINY, "prompt": "x" * 600})
    assert answer.status_code == 400
    (entry,) = service.entries()[len(before) :]
    assert (entry.outcome, entry.input_tokens, entry.output_tokens) == ("refused", 0, 0)


async def who_leaves_has_had_what_came(service: Service, http: httpx.AsyncClient) -> None:
    body = {"model": TINY, "prompt": "hello", "max_tokens": 400, "stream": True, **FORCED}
    async with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "left"}) as answer:
        lines = answer.aiter_lines()
        for _ in range(5):
            await anext(lines)
    await until(lambda: [entry for entry in service.entries() if entry.request_id == "left"])
    entry = service.entry("left")
    assert entry.outcome == "cancelled"
    assert 0 < entry.output_tokens < 400
    assert entry.input_tokens > 0


async def what_is_answered_in_the_background(service: Service, http: httpx.AsyncClient) -> None:
    body = {"model": TINY, "input": "hello", "max_output_tokens": 40, "temperature": 0, "background": True}
    begun = (await http.post("/v1/responses", json=body, headers={"x-request-id": "begun"})).json()
    assert begun["status"] in ("queued", "in_progress")
    async with asyncio.timeout(PATIENCE_S):
        while (now := (await http.get(f"/v1/responses/{begun['id']}")).json())["status"] == begun["status"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (entry,) = [entry for entry in service.entries() if entry.once]
    assert entry.once == begun["id"]
    assert (entry.input_tokens, entry.output_tokens) == of_usage(now["usage"])
    assert (entry.project, entry.outcome) == ("search", "finished")
    # By the id that its caller knows; the call that began it has had nothing by itself.
    assert [other for other in service.entries() if other.request_id == "begun"] == [entry]


async def by_grpc(service: Service) -> Counter[tuple[int, int]]:
    answers = Counter[tuple[int, int]]()
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    async with AsyncClient(service.grpc, api_key=service.key) as client:
        whole = await client.generate(model=TINY, prompt="hello", sampling=sampling, request_id="g-whole")
        assert whole.usage is not None
        answers[told := (whole.usage.prompt_tokens, whole.usage.completion_tokens)] += 1
        entry = service.entry("g-whole")
        assert (entry.input_tokens, entry.output_tokens, entry.operation) == (*told, "grpc Generate")
        assert entry.cost == Decimal(told[0] + Decimal("2.5") * told[1]) / 1_000_000
        async for chunk in client.stream(model=TINY, prompt="hello", sampling=sampling, request_id="g-stream"):
            if chunk.usage is not None:
                answers[chunk.usage.prompt_tokens, chunk.usage.completion_tokens] += 1
                assert service.entry("g-stream").outcome == "finished"
        # Admitted, and then too long.
        with pytest.raises(HyclusterError):
            await client.generate(model=TINY, prompt="x" * 600, request_id="g-long")
        entry = service.entry("g-long")
        assert (entry.outcome, entry.input_tokens, entry.output_tokens) == ("refused", 0, 0)
        with pytest.raises((HyclusterError, grpc.aio.AioRpcError)):
            await client.generate(
                model=TINY, prompt="hello", sampling=Sampling(max_tokens=400, ignore_eos=True), request_id="g-late",
                timeout_s=0.1,
            )  # fmt: skip
    await until(lambda: [entry for entry in service.entries() if entry.request_id == "g-late"])
    assert service.entry("g-late").outcome in ("cancelled", "failed")
    return answers
