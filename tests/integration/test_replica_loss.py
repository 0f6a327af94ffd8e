"""What callers see when replicas die, on a real cluster with real and simulated engines: nothing but a pause."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest

from hycluster.chaos.sse import event_lines
from hycluster.client import AsyncClient
from hycluster.core import Sampling
from hycluster.directory.directory import find_directory
from hycluster.gateway.asking import timeline_of
from tests.families import titled_below
from tests.integration.conftest import MODEL, PROMPTS, SIMULATED, Served, eventually, replicas
from tests.otlp_collector import Collector, nested

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Either way a sequence is the same each time that it is asked for.
KINDS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1, "seed": 7}]


def replica_processes(served: Served, model: str) -> list[psutil.Process]:
    """Processes that hold a replica of a model."""
    return titled_below(served.process.pid, f"replica-{model}")


def pids(model: str) -> dict[str, int]:
    """Of the processes that have replicas, by the replicas' ids."""
    listening = {
        tuple(each.laddr)[1]: each.pid for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN
    }
    found = {
        each.address.replica_id: listening[int(each.address.requests.rpartition(":")[2])] for each in replicas(model)
    }
    return {replica: pid for replica, pid in found.items() if pid is not None}


async def over_http(caller: httpx.AsyncClient, model: str, prompt: str, tokens: int, kind: dict[str, Any]) -> Any:
    """Text, finish reason and usage of one streamed completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, **kind}
    text, end, usage = "", None, None
    async with caller.stream("POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as got:
        assert got.status_code == 200
        async for line in event_lines(got):
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["text"]
                end = choice["finish_reason"] or end
    assert usage is not None
    return text, end, usage["prompt_tokens"], usage["completion_tokens"]


async def over_grpc(caller: AsyncClient, model: str, prompt: str, tokens: int, kind: dict[str, Any]) -> Any:
    """The same by gRPC."""
    text, end, usage = "", None, None
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, **kind)
    async for chunk in caller.stream(model=model, prompt=prompt, sampling=sampling):
        usage = chunk.usage or usage
        for output in chunk.outputs:
            text += output.text
            end = output.finish_reason or end
    assert usage is not None
    return text, end, usage.prompt_tokens, usage.completion_tokens


@asynccontextmanager
async def callers(served: Served) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncClient]]:
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=served.http, timeout=200, limits=limits) as http,
        AsyncClient(served.grpc) as grpc,
    ):
        yield http, grpc


async def ask_all(http: httpx.AsyncClient, grpc: AsyncClient, model: str, tokens: int) -> list[Any]:
    """Every prompt by both ingresses, in each kind of sampling that is the same each time."""
    kinds = KINDS if model == MODEL else KINDS[:1]
    asked = [
        ask
        for prompt in PROMPTS
        for kind in kinds
        for ask in (over_http(http, model, prompt, tokens, kind), over_grpc(grpc, model, prompt, tokens, kind))
    ]
    return await asyncio.gather(*asked)


async def whole(served: Served, model: str) -> None:
    def there() -> bool:
        return len(replica_processes(served, model)) == 2 and sum(report.accepting for report in replicas(model)) == 2

    await asyncio.to_thread(eventually, there, 150, f"both replicas of {model} are there")


class Traced:
    """Some more requests by HTTP, with ids and traces of their callers'. They take longer than the streams."""

    def __init__(self, http: httpx.AsyncClient, model: str, tokens: int) -> None:
        self._http = http
        self._body = {"model": model, "prompt": "Once", "max_tokens": 2 * tokens, "ignore_eos": True}
        self._ids = {f"loss-{model}-{number}": secrets.randbits(127) + 1 for number in range(4)}
        # For how long this process' event loop was busy with something else.
        self._held_up_s = 0.0
        self._watching = asyncio.create_task(self._watch())
        self.asking = [asyncio.create_task(self._ask(name, trace)) for name, trace in self._ids.items()]

    async def _watch(self) -> None:
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(0.02)
            self._held_up_s += time.monotonic() - begun_s - 0.02

    async def replica(self) -> str | None:
        """One that decodes one of them; None if none does yet."""
        for name in self._ids:
            events = (await self._timeline(name))["events"]
            routed = [event["attributes"]["replica"] for event in events if event["name"] == "routed"]
            if any(event["name"] == "first_token" for event in events):
                return str(routed[-1])
        return None

    async def _timeline(self, name: str) -> dict[str, Any]:
        answer = await self._http.get(f"/hycluster/requests/{name}")
        if answer.status_code == 404:
            return {"events": []}
        told: dict[str, Any] = answer.raise_for_status().json()
        return told

    async def _ask(self, name: str, trace: int) -> float:
        headers = {"x-request-id": name, "traceparent": f"00-{trace:032x}-{1:016x}-01"}
        begun_s = time.monotonic()
        answer = await self._http.post("/v1/completions", json=self._body, headers=headers)
        assert answer.raise_for_status().headers["x-request-id"] == name
        return time.monotonic() - begun_s

    async def look(self, collector: Collector) -> None:
        """Their timelines add up, and each is one trace, whether it was migrated or not."""
        took_s = await asyncio.gather(*self.asking)
        self._watching.cancel()
        moved = 0
        for (name, trace), measured_s in zip(self._ids.items(), took_s, strict=True):
            told = (await self._http.get(f"/hycluster/requests/{name}")).raise_for_status().json()
            assert sum(span["duration_s"] for span in told["spans"]) == pytest.approx(told["duration_s"], rel=1e-3)
            assert measured_s * 0.5 - self._held_up_s <= told["duration_s"] <= measured_s + 0.05
            stages = {span["name"] for span in told["spans"]}
            assert {"prefill", "decode"} <= stages
            lost = [event for event in told["events"] if event["name"] == "migrated"]
            moved += len(lost)
            spans = await asyncio.to_thread(collector.trace, f"{trace:032x}")
            legs = [span for span in spans if span.name.startswith("generate ")]
            assert len(legs) == 1 + len(lost)
            assert nested(spans)
            assert ("migrate" in stages) == ("migrate" in {span.name for span in spans}) == bool(lost)
        assert moved, "none of them was on the replica that was killed"
        # As the command finds it, by the directory.
        by_ray = await timeline_of(find_directory(), name)
        assert by_ray is not None
        assert by_ray["id"] == name


@pytest.mark.parametrize(("model", "tokens"), [(SIMULATED, 80), (MODEL, 60)])
async def test_streams_of_a_killed_replica_go_on(served: Served, model: str, tokens: int, collector: Collector) -> None:
    await whole(served, model)
    async with callers(served) as (http, grpc):
        expected = await ask_all(http, grpc, model, tokens)
        processes = await asyncio.to_thread(pids, model)
        asking = asyncio.create_task(ask_all(http, grpc, model, tokens))
        traced = Traced(http, model, tokens)
        async with asyncio.timeout(120):
            while (replica := await traced.replica()) is None:  # noqa: ASYNC110 - from outside
                await asyncio.sleep(0.05)
        assert not asking.done()
        os.kill(processes[replica], signal.SIGKILL)
        assert await asking == expected
        await traced.look(collector)
        assert (await http.get("/health")).status_code == 200


async def test_streams_wait_while_there_is_no_replica_at_all(served: Served) -> None:
    await whole(served, SIMULATED)
    async with callers(served) as (http, grpc):
        expected = await ask_all(http, grpc, SIMULATED, 80)
        asking = asyncio.create_task(ask_all(http, grpc, SIMULATED, 80))
        await asyncio.sleep(1)
        for process in replica_processes(served, SIMULATED):
            os.kill(process.pid, signal.SIGKILL)
        # For those who come now there is a truthful answer. Not before the ingress process has noticed: who is in waits
        # too.
        async with asyncio.timeout(60):
            asked = {"model": SIMULATED}
            while (await http.get("/health", params=asked)).status_code == 200:  # noqa: ASYNC110 - from outside
                await asyncio.sleep(0.02)
        # The other models' callers are none the worse for it.
        assert (await http.get("/health")).json()["status"] == "degraded"
        answer = await http.post("/v1/completions", json={"model": SIMULATED, "prompt": "x", "max_tokens": 2})
        assert answer.status_code == 503
        assert await asking == expected
    await whole(served, SIMULATED)
