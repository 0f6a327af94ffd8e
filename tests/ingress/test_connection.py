"""Connections to the HTTP ingress that keep it waiting, send too much, or are too many."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.ingress.connection import MAX_HEADER_BYTES, MAX_HEADERS, protocol
from hycluster.settings.ingress import Http

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

pytestmark = pytest.mark.timeout(30)
Serve = Callable[..., AbstractAsyncContextManager["IngressProcess"]]
ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNK = b"x" * (1 << 20)


class IngressProcess:
    """A uvicorn server over an app that answers ``/`` at once, and ``/flood`` without end.

    Attributes:
        sent: bytes of floods that the server has taken from the app.
        flooding: floods now running.
    """

    def __init__(self) -> None:
        self.port = 0
        self.sent = 0
        self.flooding = 0
        self.server: Any = None

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/":
            await send({"type": "http.response.body", "body": b"hello"})
            return
        self.flooding += 1
        try:
            gone = asyncio.create_task(self._gone(receive))
            while not gone.done():
                await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
                self.sent += len(CHUNK)
                await asyncio.sleep(0)
        finally:
            self.flooding -= 1

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@pytest.fixture
def serve() -> Serve:
    @asynccontextmanager
    async def serving(**settings: Any) -> AsyncIterator[IngressProcess]:
        import uvicorn

        ingress = IngressProcess()
        config = uvicorn.Config(
            ingress.app,
            http=protocol(Http(**settings)),
            port=0,
            interface="asgi3",
            log_config=None,
            lifespan="off",
            access_log=False,
        )
        ingress.server = uvicorn.Server(config)
        running = asyncio.create_task(ingress.server._serve())
        while not ingress.server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        ingress.port = ingress.server.servers[0].sockets[0].getsockname()[1]
        try:
            yield ingress
        finally:
            ingress.server.should_exit = ingress.server.force_exit = True
            await running

    return serving


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes until the connection ends."""
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def refusal(reader: asyncio.StreamReader) -> tuple[int, str]:
    status, headers, body = await answer(reader)
    error = json.loads(body)["error"]
    assert headers["connection"] == "close"
    assert error["code"] == status
    return status, error["message"]


async def hello(ingress: IngressProcess) -> None:
    """Somebody else is served."""
    reader, writer = await ingress.dial()
    writer.write(ASK)
    assert (await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_connection_that_says_nothing_is_closed(serve: Serve) -> None:
    async with serve(stalled_client_timeout_s=0.3) as ingress:
        reader, writer = await ingress.dial()
        begun = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert 0.2 < time.monotonic() - begun < 3
        writer.close()


async def test_headers_that_come_too_slowly(serve: Serve) -> None:
    async with serve(stalled_client_timeout_s=0.4) as ingress:
        reader, writer = await ingress.dial()
        writer.write(ASK[:-2])

        async def drip() -> None:
            while True:
                writer.write(b"a: b\r\n")
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        status, message = await refusal(reader)
        dripping.cancel()
        assert (status, message) == (408, "headers: no end of them came within 0.4 s")
        writer.close()
        await hello(ingress)


async def test_the_second_request_of_a_connection_has_the_same_bounds(serve: Serve) -> None:
    async with serve(stalled_client_timeout_s=0.4) as ingress:
        reader, writer = await ingress.dial()
        for _ in range(2):
            writer.write(ASK)
            await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)
        writer.write(b"GET / HT")
        assert (await refusal(reader))[0] == 408
        writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\na: " + b"x" * MAX_HEADER_BYTES + b"\r\n\r\n",
        b"GET /" + b"x" * MAX_HEADER_BYTES + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % number for number in range(MAX_HEADERS + 1)) + b"\r\n",
        # Without an end, it must not wait for one.
        b"GET / HTTP/1.1\r\na: " + b"x" * (MAX_HEADER_BYTES + 1),
    ],
)
async def test_headers_over_the_bound(serve: Serve, head: bytes) -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(head)
        assert await refusal(reader) == (
            431,
            f"headers: more than {MAX_HEADERS}, or more than {MAX_HEADER_BYTES} bytes",
        )
        writer.close()
        await hello(ingress)


async def test_what_is_no_http(serve: Serve) -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(b"\xff\xfe\r\n\r\n")
        assert await refusal(reader) == (400, "Invalid HTTP request received.")
        writer.close()
        await hello(ingress)


async def test_headers_at_the_bound_and_a_long_body(serve: Serve) -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        lines = [b"h%d: %s" % (number, b"x" * 500) for number in range(MAX_HEADERS - 1)]
        lines.append(b"content-length: %d" % (4 * MAX_HEADER_BYTES))
        writer.write(b"POST / HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + b"x" * (4 * MAX_HEADER_BYTES))
        # Many small requests in one piece are not one large one.
        writer.write(ASK * 4000)
        for _ in range(4001):
            assert (await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_connections_over_the_bound_are_told_so(serve: Serve) -> None:
    async with serve(max_connections=3) as ingress:
        kept = [await ingress.dial() for _ in range(3)]
        await asyncio.sleep(0.1)
        reader, writer = await ingress.dial()
        status, headers, body = await answer(reader)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["message"] == "the ingress process has 3 connections open already"
        writer.close()
        kept.pop()[1].close()
        await asyncio.sleep(0.1)
        await hello(ingress)
        for _, one in kept:
            one.close()


async def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody(serve: Serve) -> None:
    async with serve(stalled_client_timeout_s=1) as ingress:
        _, writer = await ingress.dial()
        writer.write(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.5)
        assert ingress.flooding == 1
        taken = ingress.sent
        await hello(ingress)
        # Only what kernel and transport buffer is ever taken from the app.
        assert ingress.sent == taken < 64 << 20
        async with asyncio.timeout(5):
            while ingress.flooding:  # noqa: ASYNC110 - tests look from outside
                await asyncio.sleep(0.05)
        assert not ingress.server.server_state.connections
        writer.close()


async def test_a_client_that_reads_slowly_but_reads_is_served(serve: Serve) -> None:
    async with serve(stalled_client_timeout_s=0.5) as ingress:
        reader, writer = await ingress.dial()
        writer.write(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert await reader.read(4 << 20)
            await asyncio.sleep(0.02)
        assert ingress.flooding == 1
        writer.close()
