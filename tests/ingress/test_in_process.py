"""Who leaves an app in the same process is missed by what it had begun there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.ingress.in_process import post
from tests.waiting import PATIENCE_S, until

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class Detached:
    """Does its work in a task beside the call, as vLLM's handlers do: whoever cancels the call does not reach it.

    Attributes:
        ended: how the work did.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        work = asyncio.create_task(self._work())
        leaving = asyncio.create_task(self._until_it_leaves(receive))
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            return
        leaving.cancel()
        headers = [(b"retry-after", b"3")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        for half in (body[:3], body[3:]):
            await send({"type": "http.response.body", "body": half, "more_body": half == body[:3]})

    async def _until_it_leaves(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _work(self) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(self.takes_s)
            self.ended = "done"
        except asyncio.CancelledError:
            # As the abort that goes to an engine.
            await asyncio.sleep(0.05)
            self.ended = "cancelled"

    takes_s = 0.01


async def test_the_answer_comes_whole() -> None:
    answer = await post(Detached(), "/v1/x", b'{"a": 1}', {"X-Request-Id": "r"})
    assert (answer.status, json.loads(answer.body), answer.headers["Retry-After"]) == (429, {"a": 1}, "3")


async def test_what_was_begun_ends_with_who_asked() -> None:
    app = Detached()
    app.takes_s = 600
    asking = asyncio.create_task(post(app, "/", b"{}", {}))
    await app.begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asking, PATIENCE_S)
    await until(lambda: app.ended is not None)
    assert app.ended == "cancelled"


async def test_one_that_does_not_listen_is_cancelled() -> None:
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("here")

    asking = asyncio.create_task(post(app, "/", b"{}", {}))
    await asyncio.sleep(0.05)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(asking, PATIENCE_S)
    assert ended == ["here"]


async def test_one_that_breaks_answers_500() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    answer = await post(app, "/", b"{}", {})
    assert (answer.status, answer.body) == (500, b"")


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_imported")
async def test_vllms_own_handlers_end_with_who_asked() -> None:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    begun, ended = asyncio.Event(), asyncio.Event()

    @with_cancellation  # type: ignore[untyped-decorator]
    async def complete(*, raw_request: Request) -> None:
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    async def route(request: Request) -> Response:
        # vLLM's wrapper is for routes that have read it.
        await request.body()
        await complete(raw_request=request)
        return Response()

    app = Starlette(routes=[Route("/v1/completions", route, methods=["POST"])])
    asking = asyncio.create_task(post(app, "/v1/completions", b"{}", {}))
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asking, PATIENCE_S)
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
