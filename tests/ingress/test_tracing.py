"""Requests by every way in, over a gateway and simulated engines: their timelines, and their traces at a collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pyarrow as pa
import pytest

from hycluster.batch.generate import Generate
from hycluster.batch.input.corpus import ROW_ID, SHARD
from hycluster.batch.input.tables import pack
from hycluster.batch.job import Job
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.task import open_task
from hycluster.ingress.errors import KIND_HEADER
from hycluster.ingress.grpc import GrpcIngress, serve_grpc
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.observe.export import Export
from hycluster.observe.timelines import recorder
from hycluster.settings.ingress import Grpc, Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.observe import Tracing
from hycluster.settings.simulated import Simulated
from tests.located import at
from tests.otlp_collector import Collector, attributes_of, nested
from tests.simulated_pool import SimulatedPool

if TYPE_CHECKING:
    from hycluster.gateway.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

# A second for fifty tokens.
ENGINE = Simulated(vocab_size=256, max_model_len=512, step_base_s=0.02, decode_token_s=0.0, prefill_token_s=0.0)
TOKENS = 50
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_completion_tokens": TOKENS,
    "ignore_eos": True,
    "stream": True,
}


def traceparent(trace: int) -> str:
    return f"00-{trace:032x}-{trace:016x}-01"


class Service:
    """Both ingresses, and what is behind them."""

    def __init__(self, url: str, grpc_ingress: GrpcIngress, generator: Generator, pool: SimulatedPool) -> None:
        self.url = url
        self.grpc = grpc_ingress
        self.generator = generator
        self.pool = pool

    async def chat(
        self, trace: int, request_id: str | None = None, *, dies_after: int | None = None
    ) -> tuple[httpx.Headers, float]:
        """A streamed chat, and how long it took; its replica dies after so many chunks."""
        headers = {"traceparent": traceparent(trace)} | ({"x-request-id": request_id} if request_id else {})
        chunks = 0
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
            # Neither the client's making nor its connection are the service's time.
            await client.get("/health")
            begun_s = time.monotonic()
            async with client.stream("POST", "/v1/chat/completions", json=CHAT, headers=headers) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    chunks += bool(line)
                    if chunks == dies_after:
                        next(replica for replica in self.pool.replicas if replica.requests).die()
            took_s = time.monotonic() - begun_s
        # One may hold several tokens where this process is late.
        assert chunks > TOKENS // 4
        return answer.headers, took_s

    async def call(self, trace: int, max_tokens: int = TOKENS, n: int = 1) -> tuple[Any, float]:
        """The same by gRPC: what the call ended with."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc.port}") as channel:
            request = pb.GenerateRequest(model="tiny", prompt="hi", request_id="by-grpc" if n == 1 else "")
            request.sampling.max_tokens, request.sampling.ignore_eos, request.sampling.n = max_tokens, True, n
            await channel.channel_ready()
            begun_s = time.monotonic()
            call = inference_pb2_grpc.InferenceStub(channel).Generate(
                request, metadata=(("traceparent", traceparent(trace)),)
            )
            await call
            return dict(await call.trailing_metadata()), time.monotonic() - begun_s

    async def row(self, trace: int, folder: Path) -> None:
        """A job with one row."""
        output = OutputFolder(at(folder / "out"))
        output.claim({})
        columns = {"text": "text", "traceparent": "trace"}
        job = Job.model_validate(
            {
                "name": "job",
                "model": "tiny",
                "task": "generate",
                "input": {"path": str(folder), "columns": columns},
                "output": {"path": str(folder / "out")},
                "sampling": {"max_tokens": TOKENS, "ignore_eos": True},
            }
        )

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[Any]:
            yield self.generator

        table = pa.table({"text": ["hi"], "trace": [traceparent(trace)], ROW_ID: ["f.parquet#0"], SHARD: [0]})
        stage = Generate(output, partial(open_task, job, connect), lambda *_: None, name="job")
        (record,) = (await stage(pack(table))).column("record").to_pylist()
        assert json.loads(record)["rows"] == 1
        assert stage._opened is not None
        await stage._opened.__aexit__(None, None, None)

    async def why(self, request_id: str) -> Any:
        async with httpx.AsyncClient(timeout=30) as client:
            return (await client.get(f"{self.url}/hycluster/requests/{request_id}")).raise_for_status().json()


@contextlib.asynccontextmanager
async def served(tiny_model: Path) -> AsyncIterator[Service]:
    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import serve_http

    model = Model(name="tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})
    with SimulatedPool(ENGINE, 2) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=60
        ) as gateway:
            generator = Generator({model.name: gateway})
            http = await serve_http(generator, Http(port=0), drain_timeout_s=1)
            by_grpc = await serve_grpc(generator, Grpc(port=0))
            try:
                yield Service(f"http://127.0.0.1:{http.port}", by_grpc, generator, pool)
            finally:
                await http.stop()
                await by_grpc.stop(1)


def adds_up(told: Any, measured_s: float | None = None) -> None:
    total_s = told["duration_s"]
    assert sum(span["duration_s"] for span in told["spans"]) == pytest.approx(total_s, rel=1e-3)
    assert total_s > 0.9
    if measured_s is not None:
        assert total_s == pytest.approx(measured_s, rel=0.05)


async def test_every_way_in_is_one_trace_and_one_timeline(tiny_model: Path, tmp_path: Path) -> None:
    with Collector() as collector:
        async with served(tiny_model) as service:
            export = Export(recorder, Tracing(endpoint=collector.endpoint), environment={})
            try:
                (headers, http_s), (trailing, grpc_s), _ = await asyncio.gather(
                    service.chat(1, "by-http"), service.call(2), service.row(3, tmp_path)
                )
                (moved, moved_s) = await service.chat(4, dies_after=10)
            finally:
                await asyncio.to_thread(export.close)
            assert headers["x-request-id"] == "by-http"
            assert trailing["x-request-id"] == "by-grpc"
            await contents_are_exported_if_asked_for(service)
            await timelines_add_up(service, http_s, grpc_s, moved["x-request-id"], moved_s)
            await lists_and_errors(service)
            await durations_point_at_their_traces(service)
            await nothing_is_told_where_the_page_is_not(service)
        traces = collector.traces(roots=4)
    whole(traces)


async def contents_are_exported_if_asked_for(service: Service) -> None:
    with Collector("grpc") as collector:
        tracing = Tracing(endpoint=collector.endpoint, protocol="grpc", capture_content=True)
        export = Export(recorder, tracing, environment={})
        try:
            await asyncio.gather(*(service.call(trace, max_tokens=3, n=2) for trace in (5, 6)))
        finally:
            await asyncio.to_thread(export.close)
        traces = await asyncio.to_thread(collector.traces, roots=2)
    for trace in (5, 6):
        said = attributes_of(next(span for span in traces[f"{trace:032x}"] if span.kind == span.SPAN_KIND_SERVER))
        (asked,) = json.loads(said["gen_ai.input.messages"])
        assert (asked["role"], asked["parts"][0]["content"]) == ("user", "hi")
        answered = json.loads(said["gen_ai.output.messages"])
        assert [each["role"] for each in answered] == ["assistant", "assistant"]
        assert said["gen_ai.usage.output_tokens"] == 6


async def timelines_add_up(service: Service, http_s: float, grpc_s: float, moved: str, moved_s: float) -> None:
    by_http = await service.why("by-http")
    adds_up(by_http, http_s)
    assert (by_http["status"], by_http["model"], by_http["output_tokens"]) == ("ok", "tiny", TOKENS)
    took_s = {span["name"]: span["duration_s"] for span in by_http["spans"]}
    assert {"prepare", "send", "prefill", "decode"} <= took_s.keys()
    assert took_s["decode"] >= 0.9 * (TOKENS - 1) * ENGINE.step_base_s
    # Not always decode: a full garbage collection of a whole suite's heap takes a second, too.
    assert by_http["slowest_stage"] == max(took_s, key=took_s.__getitem__)
    assert (await service.why("chatcmpl-by-http"))["id"] == "by-http"
    adds_up(await service.why("by-grpc"), grpc_s)
    adds_up(await service.why("f.parquet%230"))
    told = await service.why(moved)
    adds_up(told, moved_s)
    names = [event["name"] for event in told["events"]]
    assert names.count("sent") == 2
    event = next(event["attributes"] for event in told["events"] if event["name"] == "migrated")
    assert {event["from"], event["to"]} == {"r0", "r1"}
    assert 1 <= event["tokens_kept"] < TOKENS
    assert "migrate" in {span["name"] for span in told["spans"]}


async def durations_point_at_their_traces(service: Service) -> None:
    """As exemplars, which OpenMetrics has."""
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        page = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    for name, trace in (("http_request_duration_seconds_bucket", 4), ("grpc_server_handling_seconds_bucket", 2)):
        series = [line for line in page.text.splitlines() if line.startswith(name)]
        assert any(f'# {{trace_id="{trace:032x}"}}' in line for line in series), name


async def nothing_is_told_where_the_page_is_not(service: Service) -> None:
    from hycluster.ingress.http import serve_http

    http = await serve_http(service.generator, Http(port=0, ui=False), drain_timeout_s=1)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=30) as client:
            for path in ("/hycluster/requests", "/hycluster/requests/by-http"):
                answer = await client.get(path)
                # By which ``hycluster why`` tells it from a request that nobody knows.
                assert (answer.status_code, answer.headers.get(KIND_HEADER)) == (404, None)
    finally:
        await http.stop()


async def lists_and_errors(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        listed = (await client.get("/hycluster/requests", params={"slowest": 2, "model": "tiny"})).json()["requests"]
        assert len(listed) == 2
        assert listed[0]["duration_s"] >= listed[1]["duration_s"]
        assert set(listed[0]) == {
            "id",
            "model",
            "priority",
            "status",
            "started",
            "duration_s",
            "ttft_s",
            "slowest_stage",
        }
        assert (await client.get("/hycluster/requests", params={"model": "none"})).json() == {"requests": []}
        unknown = await client.get("/hycluster/requests/nobody's")
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
        assert unknown.headers[KIND_HEADER] == "NotFound"
        for wrong in ("0", "-1", "many", "100000"):
            refused = await client.get("/hycluster/requests", params={"slowest": wrong})
            assert refused.status_code == 400
            assert "must be a whole number from 1 to 1000" in refused.json()["error"]["message"]
        rows = (await client.get("/hycluster/requests", params={"priority": "batch", "slowest": 1000})).json()[
            "requests"
        ]
        assert "job-f.parquet#0" in {each["id"] for each in rows}
        assert {each["priority"] for each in rows} == {"batch"}
        mistyped = await client.get("/hycluster/requests", params={"slowset": "2"})
        assert mistyped.status_code == 400
        assert "slowset: is not allowed; must be one of model, priority, slowest" in mistyped.json()["error"]["message"]
        refused = await client.get("/hycluster/requests", params={"priority": "bulk"})
        assert refused.status_code == 400
        assert "priority: 'bulk' is not allowed; must be online or batch" in refused.json()["error"]["message"]
        for answer in (unknown, await client.get("/health"), await client.post("/v1/chat/completions", json={})):
            assert len(answer.headers.get_list("x-request-id")) == 1
        given = await client.get("/v1/models", headers={"x-request-id": "mine"})
        assert given.headers["x-request-id"] == "mine"


def whole(traces: dict[str, list[Any]]) -> None:
    by_http, by_grpc, row, moved = (traces[f"{trace:032x}"] for trace in (1, 2, 3, 4))
    for trace, spans in enumerate((by_http, by_grpc, row, moved), 1):
        assert nested(spans)
        (root,) = (span for span in spans if span.parent_span_id == trace.to_bytes(8))
        said = attributes_of(root)
        assert root.name == f"{said['gen_ai.operation.name']} tiny"
        assert said["gen_ai.usage.output_tokens"] == TOKENS
        events = {event.name for span in spans for event in span.events}
        assert {"received", "admitted", "routed", "queued", "scheduled", "first_token", "finished"} <= events
        # Nobody switched it on.
        assert "gen_ai.input.messages" not in said
    for spans in (by_http, by_grpc, row):
        (leg,) = (name for name in nested(spans) if name.startswith("generate r"))
        assert nested(spans)[leg][-1] == "decode"
    legs = [span for span in moved if span.name.startswith("generate r")]
    assert len(legs) == 2
    assert "migrate" in {span.name for span in moved}
    assert attributes_of(legs[0])["hycluster.replica"] != attributes_of(legs[1])["hycluster.replica"]
