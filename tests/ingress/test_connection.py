"""Connections to the HTTP ingress that keep it waiting, send too much, or are too many."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from hycluster.ingress import connection
from hycluster.ingress.connection import MAX_HEADER_BYTES, MAX_HEADERS
from tests.ingress.raw_ingress import ASK, answer, hello, refusal, serve, whole_answer
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with serve(stalled_client_timeout_s=0.3) as ingress:
        reader, writer = await ingress.dial()
        begun = time.monotonic()
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        assert time.monotonic() - begun > 0.2
        writer.close()


async def test_headers_that_come_too_slowly() -> None:
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


async def test_the_second_request_of_a_connection_has_the_same_bounds() -> None:
    async with serve(stalled_client_timeout_s=0.4) as ingress:
        reader, writer = await ingress.dial()
        for _ in range(2):
            writer.write(ASK)
            await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), PATIENCE_S)
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
async def test_headers_over_the_bound(head: bytes) -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(head)
        assert await refusal(reader) == (
            431,
            f"headers: more than {MAX_HEADERS}, or more than {MAX_HEADER_BYTES} bytes",
        )
        writer.close()
        await hello(ingress)


async def test_what_is_no_http() -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(b"\xff\xfe\r\n\r\n")
        assert await refusal(reader) == (400, "Invalid HTTP request received.")
        writer.close()
        await hello(ingress)


async def test_headers_at_the_bound_and_a_long_body() -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        lines = [b"h%d: %s" % (number, b"x" * 500) for number in range(MAX_HEADERS - 2)]
        lines += [b"host: x", b"content-length: %d" % (4 * MAX_HEADER_BYTES)]
        writer.write(b"POST / HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + b"x" * (4 * MAX_HEADER_BYTES))
        # Many small requests in one piece are not one large one.
        writer.write(ASK * 4000)
        for _ in range(4001):
            assert (await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), PATIENCE_S)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_one_on_which_nothing_is_asked_any_more_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "GIVES_WAY_AFTER_S", 0.3)
    async with serve(max_connections=2) as ingress:
        begun, writer = await ingress.dial()
        writer.write(ASK[:-2])
        idle, other = await ingress.dial()
        other.write(ASK)
        await whole_answer(idle)
        # Who may be about to ask again keeps its place.
        reader, refused = await ingress.dial()
        assert (await refusal(reader))[0] == 429
        await asyncio.sleep(0.4)
        await hello(ingress)
        assert await asyncio.wait_for(idle.read(), PATIENCE_S) == b""
        writer.write(b"\r\n")
        await whole_answer(begun)
        for one in (writer, other, refused):
            one.close()


async def test_connections_over_the_bound_are_told_so() -> None:
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


async def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody() -> None:
    async with serve(stalled_client_timeout_s=1) as ingress:
        _, writer = await ingress.dial()
        writer.write(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: ingress.flooding)
        await asyncio.sleep(0.5)
        taken = ingress.sent
        await hello(ingress)
        # Only what kernel and transport buffer is ever taken from the app.
        assert ingress.sent == taken < 64 << 20
        await until(lambda: not ingress.flooding)
        assert not ingress.server.server_state.connections
        writer.close()


async def test_a_client_that_reads_slowly_but_reads_is_served() -> None:
    async with serve(stalled_client_timeout_s=1) as ingress:
        reader, writer = await ingress.dial()
        writer.write(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert await reader.read(4 << 20)
            await asyncio.sleep(0.02)
        assert ingress.flooding == 1
        writer.close()
