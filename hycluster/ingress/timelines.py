"""``x-request-id`` on every answer of the HTTP ingress, the timelines of its requests, and the routes that show them.

``GET /hycluster/requests/{id}`` is one request's timeline, ``GET /hycluster/requests?slowest=N&model=M`` a list of
those that took longest, of all processes of the service. Neither says anything of a prompt or an answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote

from ray.actor import ActorHandle
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.errors import InvalidInput, NotFound, kind_name, shown
from hycluster.gateway.asking import slowest, timeline_of
from hycluster.gateway.places import holding_places
from hycluster.ingress.errors import answer_error, headers_of
from hycluster.ledger.account import account_book
from hycluster.observe.timelines import MOST_LISTED, Carried
from hycluster.stages import KEPT
from hycluster.trace_context import trace_context, written_id

PATH = "/hycluster/requests"
REQUEST_ID = b"x-request-id"
# In a request's scope, where a layer further out wants to know its timeline: a list, as layers go on with a copy of it.
TIMELINE_KEY = "hycluster.timeline"
DEFAULT_LISTED = 10
# What a list may be asked for by.
QUERY = frozenset({"slowest", "model", "priority"})
# What asks an engine for something, and may take its time.
TIMED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/pooling",
        "/classify",
    }
)


def new_request_id() -> str:
    """As vLLM draws them."""
    return secrets.token_hex(16)


class WithTimelines:
    """ASGI middleware: gives each request its id, and those that ask an engine a timeline."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = list(scope["headers"])
        said = next((value for name, value in headers if name == REQUEST_ID), b"")
        request_id = written_id(said).encode() or new_request_id().encode()
        if request_id != said:
            # vLLM's app makes the id in an answer's body of it.
            others = (header for header in headers if header[0] != REQUEST_ID)
            scope = {**scope, "headers": [*others, (REQUEST_ID, request_id)]}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                _name(message, request_id)
            await send(message)

        path = scope["path"]
        if scope["method"] != "POST" or path not in TIMED:
            await self._app(scope, receive, named)
            return
        await self._timed(scope, receive, send, request_id)

    async def _timed(self, scope: Scope, receive: Receive, send: Send, named: bytes) -> None:
        request_id = named.decode()
        parent = trace_context(_texts(scope["headers"]))
        operation = f"POST {scope['path']}"
        with (
            Carried(request_id, operation, parent) as timeline,
            account_book.account(request_id, operation) as account,
            holding_places() as places,
        ):
            scope.get(TIMELINE_KEY, []).append(timeline)
            whole = left = False

            async def heard() -> Message:
                nonlocal left
                message = await receive()
                # Also said of an answer that is whole.
                left |= message["type"] == "http.disconnect" and not whole
                return message

            async def end(message: Message) -> None:
                nonlocal whole
                await send(message)
                whole = True

            # Called for each token of each stream.
            def seen(message: Message) -> Awaitable[None]:
                if message["type"] == "http.response.start":
                    _name(message, named)
                    status = timeline.attributes["http.response.status_code"] = message["status"]
                    if status >= 400:
                        timeline.error = f"HTTP {status}"
                    if places.refusal is not None and status == places.refusal.http_status:
                        timeline.error = f"{kind_name(places.refusal)}: {places.refusal.message}"
                        _add_headers(message, headers_of(places.refusal))
                    if account is not None:
                        account.error = status >= 400
                elif account is not None:
                    account.settle()
                last = message["type"] == "http.response.body" and not message.get("more_body")
                return end(message) if last else send(message)

            await self._app(scope, heard, seen)
            # What is answered to nobody is whole as well.
            timeline.cancelled = places.left = left or not whole
            if account is not None:
                account.left = left or not whole


def _name(begun: Message, request_id: bytes) -> None:
    begun["headers"] = [*begun.get("headers", ()), (REQUEST_ID, request_id)]


def _add_headers(begun: Message, headers: Mapping[str, str]) -> None:
    """Those that it does not have yet."""
    known = {name.lower() for name, _ in begun["headers"]}
    new = ((name.lower().encode(), value.encode()) for name, value in headers.items())
    begun["headers"] = [*begun["headers"], *(header for header in new if header[0] not in known)]


def _texts(headers: list[tuple[bytes, bytes]]) -> Mapping[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


class RequestsRoute:
    """ASGI middleware: answers :data:`PATH` itself."""

    def __init__(self, app: ASGIApp, directory: Callable[[], ActorHandle[Any] | None]) -> None:
        self._app = app
        self._directory = directory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        ours = scope["type"] == "http" and (path == PATH or path.startswith(f"{PATH}/"))
        if not ours or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        await (await self._answer(path, scope))(scope, receive, send)

    async def _answer(self, path: str, scope: Scope) -> ASGIApp:
        request_id = _below(scope)
        try:
            if request_id:
                found = await timeline_of(self._directory(), request_id)
                if found is None:
                    raise NotFound(f"id: no process knows a request {shown(request_id)}; {KEPT}")
                return JSONResponse(found)
            query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            if unknown := query.keys() - QUERY:
                raise InvalidInput(f"{min(unknown)[:50]}: is not allowed; must be one of {', '.join(sorted(QUERY))}")
            most = _number(query.get("slowest", [str(DEFAULT_LISTED)])[0])
            bulk = _priority(query.get("priority", ["online"])[0]) == "batch"
            listed = await slowest(self._directory(), most, query.get("model", [None])[0], bulk=bulk)
            return JSONResponse({"requests": listed})
        except (InvalidInput, NotFound) as error:
            return await answer_error(None, error)


def _below(scope: Scope) -> str:
    """What follows :data:`PATH`: a row's id may have slashes in it, escaped or not."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path = unquote(raw.partition(b"?")[0].decode("latin-1"))
    return path.removeprefix(PATH).removeprefix("/")


def _number(said: str) -> int:
    if not said.isascii() or not said.isdigit() or not 1 <= int(said) <= MOST_LISTED:
        raise InvalidInput(f"slowest: {shown(said)} is not allowed; must be a whole number from 1 to {MOST_LISTED}")
    return int(said)


def _priority(said: str) -> str:
    if said not in ("online", "batch"):
        raise InvalidInput(f"priority: {shown(said)} is not allowed; must be online or batch")
    return said
