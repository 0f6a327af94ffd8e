"""A uvicorn server with an ingress process's connections over an app that does as its paths say, and raw clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from hycluster.ingress.connection import protocol
from hycluster.settings.ingress import Http
from tests.waiting import PATIENCE_S

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNK = b"x" * (1 << 20)
SLOW = [b"%d " % number for number in range(8)]


class RawIngress:
    """
    Attributes:
        sent: bytes of floods that the server has taken from the app.
        flooding: floods now running.
        gone: callers of slow answers that the app heard leave.
        seen: headers of the requests.
    """

    def __init__(self) -> None:
        self.port = 0
        self.sent = 0
        self.flooding = 0
        self.gone = 0
        self.seen: list[list[tuple[bytes, bytes]]] = []
        self.server: Any = None
        self.dialed: list[asyncio.StreamWriter] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["headers"])
        if scope["path"] == "/read":
            while (await receive()).get("more_body"):
                pass
        headers = [(b"connection", b"close")] if scope["path"] == "/last" else []
        if scope["path"] == "/measured":
            headers = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/slow":
            await self._slow(receive, send)
        elif scope["path"] == "/flood":
            await self._flood(receive, send)
        else:
            await send({"type": "http.response.body", "body": b"hello"})

    async def _slow(self, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(self._gone(receive))
        for chunk in SLOW:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0.1)
            if gone.done():
                self.gone += 1
                return
        await send({"type": "http.response.body"})
        gone.cancel()

    async def _flood(self, receive: Receive, send: Send) -> None:
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
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.dialed.append(writer)
        return reader, writer


@asynccontextmanager
async def serve(*, keep_alive: bool = True, **settings: Any) -> AsyncIterator[RawIngress]:
    import uvicorn

    ingress = RawIngress()
    config = uvicorn.Config(
        ingress.app,
        http=protocol(Http(**settings), keep_alive=keep_alive),
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
        # uvloop waits for the ends of all of them.
        for one in [*ingress.server.server_state.connections, *ingress.dialed]:
            one.transport.abort()
        await running


async def whole_answer(reader: asyncio.StreamReader) -> bytes:
    """Head and body of an answer in chunks, as they came."""
    return await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), PATIENCE_S)


def text(answer: bytes) -> bytes:
    """What its chunks hold."""
    lines = answer.partition(b"\r\n\r\n")[2].split(b"\r\n")
    return b"".join(lines[1::2])


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes until the connection ends."""
    head, _, body = (await asyncio.wait_for(reader.read(), PATIENCE_S)).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def refusal(reader: asyncio.StreamReader) -> tuple[int, str]:
    status, headers, body = await answer(reader)
    error = json.loads(body)["error"]
    assert headers["connection"] == "close"
    assert error["code"] == status
    return status, error["message"]


async def hello(ingress: RawIngress) -> None:
    """Somebody else is served."""
    reader, writer = await ingress.dial()
    writer.write(ASK)
    assert (await whole_answer(reader)).startswith(b"HTTP/1.1 200")
    writer.close()
