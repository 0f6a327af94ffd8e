"""Bodies that come too slowly, or are too much together; how large one may be is in ``test_http.py``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx

from hycluster.ingress.body import BodyLimit
from tests.waiting import PATIENCE_S, until

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class Slow:
    """An app that reads its request and then waits until it may answer."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.read = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            self.read += len(message.get("body", b""))
            more = message.get("more_body", False)
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress")


async def test_all_bodies_in_work_have_a_bound_together() -> None:
    app = Slow()
    async with client(BodyLimit(app, 1000, max_total_bytes=1500)) as http:
        first = asyncio.create_task(http.post("/", content=b"x" * 1000))
        await until(lambda: app.read >= 1000)
        shed = await http.post("/", content=b"x" * 1000)
        assert (shed.status_code, shed.headers["retry-after"]) == (429, "1")
        assert shed.json()["error"]["type"] == "RateLimitError"
        app.may_answer.set()
        assert (await first).text == "done"
        # What was refused and what is through no longer counts.
        for _ in range(3):
            assert (await http.post("/", content=b"x" * 1000)).status_code == 200


async def test_a_body_that_stops() -> None:
    app = BodyLimit(Slow(), 1000, stall_s=0.2)
    sent: list[Any] = []
    pieces = iter([{"type": "http.request", "body": b"x", "more_body": True}])

    async def receive() -> Any:
        for piece in pieces:
            return piece
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    async with asyncio.timeout(PATIENCE_S):
        await app(scope, receive, send)
    assert sent[0]["status"] == 408
    assert b"body: nothing came for 0.2 s" in sent[1]["body"]


async def test_who_waits_for_an_answer_is_not_slow() -> None:
    app = Slow()
    async with client(BodyLimit(app, 1000, stall_s=0.1)) as http:
        asking = asyncio.create_task(http.post("/", content=b"x"))
        await asyncio.sleep(0.4)
        app.may_answer.set()
        assert (await asking).text == "done"


async def test_a_smaller_bound_for_a_path() -> None:
    app = Slow()
    app.may_answer.set()
    async with client(BodyLimit(app, 1000, paths={"/tokenize": 10})) as http:
        assert (await http.post("/", content=b"x" * 11)).status_code == 200
        assert (await http.post("/tokenize", content=b"x" * 11)).status_code == 413
        assert (await http.post("/tokenize", content=b"x" * 10)).status_code == 200


async def test_what_is_in_a_body_has_a_bound() -> None:
    app = Slow()
    app.may_answer.set()
    async with client(BodyLimit(app, 10_000, max_members=100)) as http:
        for within, status in (
            ("[" * 98, 200),
            ("[" * 99, 413),
            ("{}," * 97 + '"{{"', 200),
            ('"' + "{" * 999 + '"', 200),
        ):
            answer = await http.post("/", content=f'{{"a": {within}')
            assert answer.status_code == status
        assert "body: has more than 100 members" in (await http.post("/", content="{" * 101)).text
