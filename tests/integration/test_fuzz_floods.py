"""Floods: clients that hang up, that send too much, that are too many. What is left of them afterwards is nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import grpc
import httpx
import pytest

from hycluster.ingress.proto import inference_pb2 as pb
from tests.integration.conftest import SIMULATED, TINY, Served, eventually, replicas
from tests.integration.fuzzing import (
    EXAMPLES,
    MODELS,
    Footprint,
    footprint,
    frees_soon,
    idle,
    unharmed,
    wait_until_idle,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = 200
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}
# What a process may hold more after a flood than after the one before it: allocators keep and reuse, in their own time.
MORE_RSS_MIB = 25.0
MORE_FILES = 5


async def hang_up_http(served: Served, number: int, *, stream: bool) -> None:
    body = {"model": MODELS[number % 2], "prompt": f"number {number}", "n": 1 + number % 3, "stream": stream, **LONG}
    host, port = served.http.removeprefix("http://").split(":")
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + b"\r\n\r\n" + text)
    if stream:
        # In mid-stream, or while it still waits.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"data: "), 2)
    else:
        await asyncio.sleep(0.5)
    writer.transport.abort()


async def hang_up_grpc(channel: grpc.aio.Channel, number: int, *, stream: bool) -> None:
    request = pb.GenerateRequest(
        model=MODELS[number % 2], prompt=f"number {number}", sampling=pb.Sampling(n=1 + number % 3, **LONG)
    ).SerializeToString()
    multi: Any = channel.unary_stream if stream else channel.unary_unary
    call = multi(f"/hycluster.v1.Inference/Generate{'Stream' if stream else ''}")(request)
    if stream:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call.read())), 2)
    else:
        await asyncio.sleep(0.5)
    call.cancel()


async def hang_up(served: Served) -> None:
    """All clients at once, half of them at each ingress process."""
    async with grpc.aio.insecure_channel(served.grpc) as channel:
        await asyncio.gather(
            *(hang_up_http(served, number, stream=bool(number % 4)) for number in range(CLIENTS // 2)),
            *(hang_up_grpc(channel, number, stream=bool(number % 4)) for number in range(CLIENTS // 2)),
        )


async def pour(served: Served) -> None:
    """Headers without end, bodies without end, bodies that stop, headers in their thousands, no request at all."""
    host, port = served.http.removeprefix("http://").split(":")
    floods = [
        b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1_000_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"fffff\r\n" * 1,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 40000000\r\n\r\n" + b"[" * 40_000_000,
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 20000000\r\n\r\n" + b"[" * 20_000_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n[",
        b"\xff" * 1_000_000,
        b"GET " + b"/" * 1_000_000,
    ]

    async def send(flood: bytes) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(flood)
            await asyncio.wait_for(writer.drain(), 5)
            await asyncio.sleep(0.2)
        writer.transport.abort()

    for _ in range(max(2, EXAMPLES // 8)):
        await asyncio.gather(*map(send, floods * 2))


def settled(served: Served) -> Footprint:
    wait_until_idle(60)
    time.sleep(1)
    return footprint(served)


@pytest.mark.parametrize("flood", [hang_up, pour])
def test_the_second_flood_leaves_no_more_than_the_first(served: Served, flood: Any) -> None:
    with unharmed(served):
        # Caches, thread pools and allocators' arenas grow with the first ones.
        for _ in range(2):
            asyncio.run(flood(served))
        before = settled(served)
        for _ in range(2):
            asyncio.run(flood(served))
        after = settled(served)
    for name, rss_mib in before.rss_mib.items():
        assert after.rss_mib[name] - rss_mib < MORE_RSS_MIB, (name, before, after)
        assert after.files[name] - before.files[name] < MORE_FILES, (name, before, after)


def in_engines(model: str) -> int:
    return sum(replica.load.running + replica.load.waiting for replica in replicas(model))


@pytest.mark.parametrize("ingress", ["http", "grpc"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_all_it_had(served: Served, ingress: str, stream: bool) -> None:
    """Several sequences, of which some run and others wait: the tiny model has four places."""
    frees_soon(lambda: asyncio.run(go(served, ingress, stream)), TINY)


async def go(served: Served, ingress: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": TINY, "prompt": "go on", "n": 10, "stream": stream, **LONG}
    async with httpx.AsyncClient(timeout=60) as http, grpc.aio.insecure_channel(served.grpc) as channel:
        if ingress == "http":
            asking = asyncio.ensure_future(http.post(f"{served.http}/v1/completions", json=body))
        else:
            multi: Any = channel.unary_stream if stream else channel.unary_unary
            message = pb.GenerateRequest(model=TINY, prompt="go on", sampling=pb.Sampling(n=10, **LONG))
            call = multi(f"/hycluster.v1.Inference/Generate{'Stream' if stream else ''}")(message.SerializeToString())
            asking = asyncio.ensure_future(call.read() if stream else call)
        await asyncio.to_thread(eventually, lambda: in_engines(TINY) == 10, 60, "all ten are in the engine")
        if ingress == "grpc":
            call.cancel()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_over_the_bound_both_ingresses_say_when_to_come_back(served: Served) -> None:
    """More sequences than are admitted, at once: the rest is shed within moments, and told a time."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        body = {"model": SIMULATED, "prompt": "x", "n": 100, **LONG}
        asking = [asyncio.create_task(http.post(f"{served.http}/v1/completions", json=body)) for _ in range(10)]
        await asyncio.to_thread(eventually, lambda: in_engines(SIMULATED) == 1000, 60, "a thousand are in the engines")
        begun = time.monotonic()
        shed = await http.post(f"{served.http}/v1/completions", json=body)
        assert (shed.status_code, shed.json()["error"]["type"]) == (429, "RateLimitError")
        assert 1 <= int(shed.headers["retry-after"]) <= 60
        async with grpc.aio.insecure_channel(served.grpc) as channel:
            message = pb.GenerateRequest(model=SIMULATED, prompt="x", sampling=pb.Sampling(n=100, **LONG))
            generate: Any = channel.unary_unary("/hycluster.v1.Inference/Generate")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(message.SerializeToString())
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        told = {key: str(value) for key, value in caught.value.trailing_metadata()}
        assert 1 <= float(told["retry-after-s"]) <= 60
        assert time.monotonic() - begun < 10
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    await asyncio.to_thread(eventually, lambda: idle(SIMULATED), 60, "the engines are idle again")
