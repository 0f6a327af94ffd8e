"""What no client of good will sends: bodies and trailers without end, bytes behind a request, two Hosts, HTTP/1.0."""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import time

import pytest

from hycluster.ingress.connection import MAX_HEADER_BYTES, MAX_LATE_BYTES
from tests.ingress.raw_ingress import ASK, SLOW, answer, hello, refusal, serve, text, whole_answer
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)
SLOWLY = ASK.replace(b"/", b"/slow", 1)
CHUNKED = b"POST /%s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class TestABodyThatIsNotComplete:
    HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"

    async def test_its_connection_ends_however_it_drips(self) -> None:
        async with serve(stalled_client_timeout_s=0.5) as ingress:
            reader, writer = await ingress.dial()
            writer.write(self.HEAD + b"x")
            await whole_answer(reader)
            begun = time.monotonic()
            ended = asyncio.create_task(reader.read())
            while not ended.done():
                writer.write(b"x")
                await asyncio.sleep(0.05)
                assert time.monotonic() - begun < PATIENCE_S
            assert ended.result() == b""

    async def test_its_rest_may_come_later(self) -> None:
        """As from clients that send a body on its own, behind an answer that did not need it."""
        async with serve(stalled_client_timeout_s=5) as ingress:
            reader, writer = await ingress.dial()
            for _ in range(2):
                writer.write(self.HEAD)
                await whole_answer(reader)
                writer.write(b"x" * 100)
            writer.write(ASK)
            await whole_answer(reader)

    async def test_but_not_without_end(self) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(CHUNKED % b"")
            await whole_answer(reader)
            for _ in range(2 * MAX_LATE_BYTES >> 16):
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await asyncio.sleep(0)
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""


class TestTrailers:
    @pytest.mark.parametrize("piece", [b"a: b\r\n" * 1000, b"x" * 6000])
    @pytest.mark.parametrize("path", [b"read", b"slow", b""])
    async def test_without_end_take_no_memory(self, piece: bytes, path: bytes) -> None:
        """Before, during and after the answer."""
        async with serve(max_body_mib=1) as ingress:
            _, writer = await ingress.dial()
            writer.write(CHUNKED % path + b"1\r\nx\r\n0\r\n")
            await asyncio.sleep(0.1)
            before, sent = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
            with contextlib.suppress(ConnectionError, RuntimeError):
                while sent < 100 << 20:
                    writer.write(piece)
                    sent += len(piece)
                    await asyncio.wait_for(writer.drain(), PATIENCE_S)
            assert sent < 40 << 20
            assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 60
            await hello(ingress)

    async def test_are_told_so(self) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(CHUNKED % b"read" + b"1\r\nx\r\n0\r\n")
            await asyncio.sleep(0.1)
            writer.write(b"a: b\r\n" * MAX_HEADER_BYTES)
            assert await refusal(reader) == (
                431,
                f"trailers and chunk extensions: more than 100, or more than {MAX_HEADER_BYTES} bytes",
            )

    async def test_are_no_headers(self) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(CHUNKED % b"read" + b"1\r\nx\r\n0\r\nauthorization: me\r\n\r\n" + ASK)
            await whole_answer(reader)
            await whole_answer(reader)
            assert [name for name, _ in ingress.seen[0]] == [b"host", b"transfer-encoding"]


class TestBehindARequest:
    @pytest.mark.parametrize("behind", [b"\r\n", b"GET / HT", b"\xff\xfe\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
    async def test_nothing_cuts_its_answer(self, behind: bytes) -> None:
        async with serve(stalled_client_timeout_s=0.3) as ingress:
            reader, writer = await ingress.dial()
            writer.write(SLOWLY)
            await asyncio.sleep(0.1)
            writer.write(behind)
            assert text(await whole_answer(reader)) == b"".join(SLOW)
            if behind == b"\r\n":
                writer.write(ASK)
                assert (await whole_answer(reader)).startswith(b"HTTP/1.1 200")
            else:
                assert (await refusal(reader))[0] == (408 if behind == b"GET / HT" else 400)

    async def test_line_breaks_without_end(self) -> None:
        async with serve(keep_alive_timeout_s=1) as ingress:
            reader, writer = await ingress.dial()
            writer.write(ASK)
            await whole_answer(reader)
            ended, begun = asyncio.create_task(reader.read()), time.monotonic()
            while not ended.done():
                writer.write(b"\r\n")
                await asyncio.sleep(0.05)
                assert time.monotonic() - begun < PATIENCE_S

    async def test_half_a_request_without_end(self) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(SLOWLY + b"GET / HTTP/1.1\r\na: " + b"x" * 3 * MAX_HEADER_BYTES)
            assert text(await whole_answer(reader)) == b"".join(SLOW)
            assert (await refusal(reader))[0] == 431

    async def test_who_goes_is_missed_by_the_request_that_runs(self) -> None:
        async with serve() as ingress:
            _, writer = await ingress.dial()
            writer.write(SLOWLY + ASK)
            await asyncio.sleep(0.2)
            writer.transport.abort()
            await until(lambda: ingress.gone)
            assert len(ingress.seen) == 1

    async def test_a_broken_body_behind_a_request(self) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(SLOWLY + CHUNKED % b"read" + b"nonsense\r\n")
            assert text(await whole_answer(reader)) == b"".join(SLOW)
            assert (await refusal(reader))[0] == 400


async def test_a_body_that_is_no_body_is_told_so() -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(CHUNKED % b"read")
        await asyncio.sleep(0.1)
        writer.write(b"nonsense\r\n")
        assert (await refusal(reader))[0] == 400


@pytest.mark.parametrize("target", [b"example.com:443", b"http://[", b"example"])
@pytest.mark.parametrize(
    "before", [b"", ASK, SLOWLY], ids=["first", "behind one that is answered", "behind one that runs"]
)
async def test_a_target_that_is_no_url(before: bytes, target: bytes) -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(before)
        if before == ASK:
            await whole_answer(reader)
        writer.write(b"CONNECT %s HTTP/1.1\r\nhost: x\r\n\r\n" % target)
        if before == SLOWLY:
            assert text(await whole_answer(reader)) == b"".join(SLOW)
        assert (await refusal(reader))[0] == 400


@pytest.mark.parametrize("hosts", [0, 2])
async def test_one_host(hosts: int) -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(b"GET / HTTP/1.1\r\n" + b"host: x\r\n" * hosts + b"\r\n")
        assert await refusal(reader) == (400, f"headers: Host is there {hosts} times; it must be there once")
        assert not ingress.seen


class TestOldHttp:
    @pytest.mark.parametrize(("path", "body"), [("/slow", b"".join(SLOW)), ("/", b"hello"), ("/measured", b"hello")])
    async def test_its_callers_know_no_chunks(self, path: str, body: bytes) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(b"GET %s HTTP/1.0\r\nexpect: 100-continue\r\n\r\n" % path.encode())
            status, headers, got = await answer(reader)
            assert (status, got) == (200, body)
            assert "transfer-encoding" not in headers
            assert headers["connection"] == "close"

    async def test_a_head_without_a_body(self) -> None:
        async with serve() as ingress:
            reader, writer = await ingress.dial()
            writer.write(b"HEAD / HTTP/1.0\r\n\r\n")
            got = await asyncio.wait_for(reader.read(), PATIENCE_S)
            assert re.fullmatch(rb"HTTP/1.1 200 OK\r\n(.+\r\n)+\r\n", got)
