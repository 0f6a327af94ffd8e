"""Connections that are used again, also at the moment when they end: nobody is reset."""

from __future__ import annotations

import asyncio
import re
import socket
import time

import pytest

from hycluster.ingress import connection
from hycluster.ingress.connection import KEPT_LONGER_S, LEAVING_S
from hycluster.settings.ingress import Http
from tests.ingress.raw_ingress import ASK, SLOW, RawIngress, serve, text, whole_answer
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.timeout(120)
SLOWLY = ASK.replace(b"/", b"/slow", 1)


async def test_how_long_a_connection_is_kept_is_a_setting_and_told() -> None:
    assert Http().keep_alive_timeout_s >= 75
    async with serve(keep_alive_timeout_s=1) as ingress:
        reader, writer = await ingress.dial()
        for pause_s in (0, KEPT_LONGER_S / 2):
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            writer.write(ASK)
            assert b"\r\nkeep-alive: timeout=1\r\n" in await whole_answer(reader)
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        assert time.monotonic() - began > 1 + KEPT_LONGER_S / 2
        writer.close()


@pytest.mark.parametrize("begun", [ASK, b"GET / HT"])
async def test_what_came_in_time_is_read_though_the_process_was_busy(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEPT_LONGER_S", 0)
    async with serve(keep_alive_timeout_s=0.3) as ingress:
        with connected(ingress) as caller:
            await asked(caller)

            def be_busy() -> None:
                caller.sendall(begun)
                # By now it is past the time, and a loop looks at its clock before it looks at its sockets.
                time.sleep(0.5)
                loop.remove_reader(busy)

            loop, (busy, begin) = asyncio.get_running_loop(), socket.socketpair()
            with busy, begin:
                loop.add_reader(busy, be_busy)
                begin.send(b"x")
                await asyncio.sleep(0.2)
            caller.sendall(ASK[len(begun) :])
            assert (await received(caller)).startswith(b"HTTP/1.1 200")


async def test_one_who_asks_while_it_is_closed_reads_an_end_and_no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "KEPT_LONGER_S", 0)
    async with serve(keep_alive_timeout_s=0.2) as ingress:
        with connected(ingress) as caller:
            await asked(caller)
            await asyncio.sleep(0.4)
            for _ in range(3):
                caller.sendall(ASK)
                await asyncio.sleep(0.1)
            assert await received(caller) == b""


async def test_an_answer_that_ends_a_connection_is_read_by_one_who_still_sends() -> None:
    async with serve() as ingress:
        reader, writer = await ingress.dial()
        writer.write(b"POST /last HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(100):
            writer.write(b"x" * 100_000)
            await asyncio.sleep(0.001)
        assert text(await whole_answer(reader)) == b"hello"
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()


class TestLeaving:
    """Uvicorn's shutdown, as a drain calls it."""

    async def leave(self, ingress: RawIngress) -> asyncio.Task[None]:
        ingress.server.should_exit = True
        # It looks ten times a second.
        await asyncio.sleep(0.3)
        return asyncio.create_task(ended(ingress))

    async def test_who_asks_just_then_is_answered_and_told_that_it_was_the_last(self) -> None:
        async with serve() as ingress:
            idle, asking = connected(ingress), connected(ingress)
            silent = socket.create_connection(("127.0.0.1", ingress.port))
            for caller in (idle, asking):
                assert b"connection: close" not in await asked(caller)
            begun = connected(ingress)
            begun.sendall(ASK[:10])
            left = await self.leave(ingress)
            assert b"\r\nconnection: close\r\n" in await asked(asking)
            assert b"\r\nconnection: close\r\n" in await asked(silent)
            assert await received(asking) == b""
            # In the middle of its headers, longer than who has said nothing.
            assert await received(idle) == b""
            begun.sendall(ASK[10:])
            assert b"\r\nconnection: close\r\n" in await received(begun)
            await asyncio.wait_for(left, PATIENCE_S)
            for caller in (idle, asking, begun, silent):
                caller.close()

    async def test_a_running_answer_is_the_last_if_there_is_time_to_say_so(self) -> None:
        async with serve() as ingress:
            caller = connected(ingress)
            caller.sendall(SLOWLY)
            await asyncio.sleep(0.2)
            await self.leave(ingress)
            answer = await received(caller, until=b"0\r\n\r\n")
            assert text(answer) == b"".join(SLOW)
            assert b"connection: close" not in answer
            # It could not know, and may ask at once.
            assert b"\r\nconnection: close\r\n" in await asked(caller)
            caller.close()

    async def test_it_takes_no_longer_than_that(self) -> None:
        async with serve() as ingress:
            callers = [connected(ingress) for _ in range(3)]
            for caller in callers:
                await asked(caller)
            begun = time.monotonic()
            await asyncio.wait_for(await self.leave(ingress), PATIENCE_S)
            assert time.monotonic() - begun > LEAVING_S
            for caller in callers:
                caller.close()


async def test_where_each_answer_is_the_last_it_says_so() -> None:
    async with serve(keep_alive=False) as ingress:
        reader, writer = await ingress.dial()
        writer.write(ASK)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert re.findall(rb"\r\nconnection: close\r\n|keep-alive", answer) == [b"\r\nconnection: close\r\n"]
        writer.close()


def connected(ingress: RawIngress) -> socket.socket:
    """One that is read and written past the event loop, and gets what the kernel has."""
    caller = socket.create_connection(("127.0.0.1", ingress.port))
    caller.settimeout(PATIENCE_S)
    return caller


async def asked(caller: socket.socket) -> bytes:
    caller.sendall(ASK)
    return await received(caller, until=b"0\r\n\r\n")


async def received(caller: socket.socket, until: bytes = b"0\r\n\r\n") -> bytes:
    """What there is up to these bytes, or to the end; a reset raises."""
    got = b""
    while not got.endswith(until) and (piece := await asyncio.to_thread(caller.recv, 4096)):
        got += piece
    return got


async def ended(ingress: RawIngress) -> None:
    while ingress.server.server_state.connections:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
