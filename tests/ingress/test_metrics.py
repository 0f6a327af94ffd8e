"""What is counted of requests over HTTP, and what ``/metrics`` shows: the middleware by itself, over a stand-in app."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from starlette.types import Message, Receive, Scope, Send

from hycluster.ingress.metrics import LEFT, MODEL_KEY, Counted, WithMetrics, families_of_this_process
from hycluster.ingress.timelines import TIMELINE_KEY
from hycluster.timeline import Timeline
from hycluster.trace_context import TraceContext

ROUTES = ("/v1/completions", "/v1/models", "/v1/responses/{response_id}", "/health", "/metrics")


async def stand_in_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers the status that the query names, or breaks."""
    asked = scope["query_string"].decode()
    # What another layer has made of it.
    dict(scope)[MODEL_KEY].append("counted")
    timeline = Timeline("one", "ingress", "POST /v1/completions", TraceContext(0xF0, 1, True), sampled=True)
    dict(scope)[TIMELINE_KEY].append(timeline)
    while (await receive()).get("more_body"):
        pass
    if asked == "break":
        raise RuntimeError("it breaks")
    await send({"type": "http.response.start", "status": int(asked or 200), "headers": []})
    await send({"type": "http.response.body", "body": b"four", "more_body": True})
    await send({"type": "http.response.body", "body": b"teen"})


def counted(name: str = "http_requests_total", **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, {"model": "counted", "method": "POST", **labels})
    return found or 0.0


@pytest.mark.parametrize(
    ("path", "handler"),
    [
        ("/v1/completions", "/v1/completions"),
        ("/v1/responses/resp_1", "/v1/responses/{id}"),
        ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel"),
        ("/v1/files/file-1/content", "/v1/files/{id}/content"),
        ("/v1/models/org/tiny", "/v1/models/{id}"),
        ("/v1/batches", "/v1/batches"),
        ("/hycluster/requests/part-0.parquet%231", "/hycluster/requests/{id}"),
        ("/ui/static/page.js", "/ui/{id}"),
        # A path that callers make up is no series of its own.
        ("/wp-admin/setup.php", "none"),
        ("/v1/completions/1", "none"),
    ],
)
async def test_requests_are_counted_by_route_and_status(path: str, handler: str) -> None:
    def sizes() -> float:
        # Other tests of this process have asked for the same routes.
        return REGISTRY.get_sample_value("http_request_size_bytes_sum", {"handler": handler}) or 0.0

    sizes_before = sizes()
    transport = httpx.ASGITransport(Counted(stand_in_app, ROUTES), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
        for query, status in (("", "200"), ("503", "503"), ("break", "500")):
            before = counted(handler=handler, status=status)
            await http.post(f"{path}?{query}", content=b"twelve bytes")
            assert counted(handler=handler, status=status) == before + 1
    assert counted("http_request_duration_seconds_count", handler=handler) >= 3
    assert sizes() - sizes_before == 3 * len(b"twelve bytes")


async def test_what_there_is_not_is_no_models() -> None:
    """Where there is one model its app is asked for all, and says of what it is not that it is not there."""
    before = counted(handler="/v1/completions", status="404")
    nobodys = {"model": "", "method": "POST", "handler": "/v1/completions", "status": "404"}
    nobodys_before = REGISTRY.get_sample_value("http_requests_total", nobodys) or 0.0
    transport = httpx.ASGITransport(Counted(stand_in_app, ROUTES))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
        await http.post("/v1/completions?404")
    assert counted(handler="/v1/completions", status="404") == before
    assert REGISTRY.get_sample_value("http_requests_total", nobodys) == nobodys_before + 1


async def test_probes_and_scrapes_are_not_counted() -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(Counted(stand_in_app, ROUTES)), base_url="http://ingress"
    ) as http:
        for path in ("/health", "/metrics"):
            await http.post(path)
            assert counted(handler=path, status="200") == 0
    assert REGISTRY.get_sample_value("http_requests_inprogress") == 0


async def test_a_caller_who_leaves_is_no_error_of_the_service() -> None:
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        scope[MODEL_KEY].append("counted")
        while (await receive())["type"] != "http.disconnect":
            pass
        raise asyncio.CancelledError

    said: Iterator[Message] = iter([{"type": "http.request", "body": b"x"}, {"type": "http.disconnect"}])

    async def receive() -> Message:
        return next(said)

    async def send(_: Message) -> None:
        raise AssertionError("nothing is sent")

    before = counted(handler="/v1/completions", status=str(LEFT))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    with pytest.raises(asyncio.CancelledError):
        await Counted(waits, ROUTES)(scope, receive, send)
    assert counted(handler="/v1/completions", status=str(LEFT)) == before + 1


async def test_a_duration_points_at_the_trace_of_its_request() -> None:
    transport = httpx.ASGITransport(WithMetrics(Counted(stand_in_app, ROUTES), families_of_this_process))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
        await http.post("/v1/completions")
        page = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    lines = [line for line in page.text.splitlines() if line.startswith("http_request_duration_seconds_bucket")]
    assert any(f'# {{trace_id="{0xF0:032x}"}}' in line for line in lines)


async def test_one_replica_by_its_id() -> None:
    async def families() -> Sequence[Metric]:
        family = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Usage.", labels=["replica"])
        family.add_metric(["a"], 0.5)
        family.add_metric(["b"], 0.25)
        return [family]

    transport = httpx.ASGITransport(WithMetrics(stand_in_app, families))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
        page = await http.get("/metrics", params={"replica": "b"})
        assert [line for line in page.text.splitlines() if line[0] != "#"] == [
            'vllm:kv_cache_usage_perc{replica="b"} 0.25'
        ]
        missing = await http.get("/metrics", params={"replica": "c"})
        assert (missing.status_code, missing.json()["error"]["message"]) == (404, "replica: 'c' is not known here")
        assert (await http.get("/metrics/")).status_code == 200
