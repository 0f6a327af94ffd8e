"""The fast path to the routes that are asked most, for a request that is right: past FastAPI's and Starlette's layers.

An API app of vLLM's has a request go through error handlers (three layers), CORS, exit stacks, routing and the solving
of dependencies, and a stream through a task group; what that costs, ``python -m bench.overhead --tokens 1`` tells. A
body that is right goes here from its JSON to the route's handler. Whatever is not so, a wrong body, another content
type or an error that the handler raises, goes the whole way, which answers it.

Reaches into vLLM's routes: a handler takes the body's model and ``raw_request``, and is wrapped by
``with_cancellation``, which a stream does not need, since it hears by itself that its caller has left. And into
Starlette's router, whose ``middleware_stack`` is what the app's error handlers are around.
``tests/ingress/test_fast_path.py`` compares both ways.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.elastic_ep.middleware import ScalingMiddleware

from hycluster.ingress.dispatch import read_on

PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
# Middleware of vLLM's that lets such requests pass: no page asks, and it's not vLLM that scales here.
_PASSING = (CORSMiddleware, ScalingMiddleware)
# In a request's scope: what its handler raised, for the app to answer.
_RAISED = "hycluster.raised"

Handler = Callable[..., Awaitable[Any]]


class FastPath:
    """ASGI middleware around vLLM's API app of one model.

    Args:
        app: as it will stay; routes that it gets later are not on the fast path.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        plain = all(getattr(each, "cls", None) in _PASSING for each in app.user_middleware)
        routes = [route for route in app.router.routes if isinstance(route, APIRoute)] if plain else []
        self._handled = {
            route.path: _Handled(route) for route in routes if route.path in PATHS and "POST" in route.methods
        }
        router: Any = app.router
        router.middleware_stack = _raising(router.middleware_stack)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._handled.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] != "POST" or not _is_plain(scope):
            await self._app(scope, receive, send)
            return
        body, receive = await read_on(receive)
        asked = route.read(body)
        if asked is None:
            await self._app(scope, receive, send)
            return
        scope = {**scope, "app": self._app}
        request = Request(scope, receive)
        try:
            response = await route.ask(asked, request)
        except Exception as error:
            await self._app({**scope, _RAISED: error}, receive, send)
            return
        if isinstance(response, StreamingResponse):
            await _stream(response, receive, send)
        else:
            await response(scope, receive, send)


class _Handled:
    """One route on the fast path, and its handler."""

    def __init__(self, route: APIRoute) -> None:
        (self._field,) = route.dependant.body_params
        self._handler: Handler = route.endpoint
        self._of_streams: Handler = route.endpoint.__wrapped__  # type: ignore[attr-defined]

    def read(self, body: bytes) -> Any:
        """The body's model; None unless it is right."""
        try:
            asked, errors = self._field.validate(json.loads(body), {}, loc=("body",))
        except Exception:
            return None
        return None if errors else asked

    async def ask(self, asked: Any, request: Request) -> Any:
        """What the handler responds."""
        response = await (self._of_streams if asked.stream else self._handler)(asked, raw_request=request)
        # The caller has left.
        return JSONResponse(None) if response is None else response


def _raising(router: ASGIApp) -> ASGIApp:
    """The app's router, which raises for a request what its handler has raised already."""

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        if (error := scope.get(_RAISED)) is not None:
            raise error
        await router(scope, receive, send)

    return routed


def _is_plain(scope: Scope) -> bool:
    """JSON, and asked from no page."""
    kinds = list[bytes]()
    for name, value in scope["headers"]:
        if name == b"content-type":
            kinds.append(value.partition(b";")[0])
        elif name == b"origin":
            return False
    return kinds == [b"application/json"]


async def _stream(response: StreamingResponse, receive: Receive, send: Send) -> None:
    """Send a stream until its end, or until its caller leaves."""
    task, left = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        await response.stream_response(send)
    except asyncio.CancelledError:
        if not left or task.uncancel():
            raise
    finally:
        watching.cancel()
    if response.background is not None:
        await response.background()
