"""A request to an ASGI app in this process, of which one who asks can take leave as a caller by HTTP does.

Cancelling the call is not enough: vLLM's handlers run in tasks of their own, which go on without it, and so do their
requests in the engines. They end when they hear that the caller has gone, which is what they are told here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp

from hycluster.gateway.places import holding_places
from hycluster.ingress.errors import raised_at
from hycluster.ingress.metrics import MODEL_KEY
from hycluster.ledger.account import Account, account_book
from hycluster.observe.timelines import Carried
from hycluster.trace_context import trace_context

logger = logging.getLogger(__name__)

OK, BAD_REQUEST = 200, 400
# For an app that listens, to end what it has begun.
WINDS_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class InProcessAnswer:
    """What the app said."""

    status: int
    headers: Headers
    body: bytes


async def post(
    app: ASGIApp,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    heard: Callable[[MutableMapping[str, Any]], None] | None = None,
    once: str | None = None,
    models: list[str] | None = None,
) -> InProcessAnswer:
    """Ask the app. Cancelled, it ends when the app has ended what it had begun, and returns what had been answered by
    then all the same. An app that breaks answers 500.

    Args:
        heard: is told each ASGI message of the answer as it comes; a body that it is told is not kept.
        once: it is a request by itself, also where it is asked within another one, and of those that are begun again
            under this name the last one counts; None: it is part of who asks.
        models: what finds its model leaves the name there, for who counts requests.
    """
    call = _Call(app, path, body, headers, heard, once, models)
    running = asyncio.create_task(call.run())
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if not running.done():
            await call.leave(running)
            raise
        return running.result()


class _Call:
    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        heard: Callable[[MutableMapping[str, Any]], None] | None,
        once: str | None,
        models: list[str] | None,
    ) -> None:
        self._app = app
        self._once = once
        self._account: Account | None = None
        self._heard = heard
        self._scope: MutableMapping[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [
                (b"host", b"batch"),
                (b"content-length", b"%d" % len(body)),
                *((name.lower().encode(), value.encode()) for name, value in headers.items()),
            ],
            "client": ("127.0.0.1", 0),
            "server": ("batch", 80),
            MODEL_KEY: [] if models is None else models,
        }
        self._body: bytes | None = body
        self._over = asyncio.Event()
        self._left = False
        self._listening = 0
        self._status = 500
        self._headers = Headers()
        self._answer = bytearray()

    async def run(self) -> InProcessAnswer:
        named = Headers(raw=self._scope["headers"]).get("x-request-id") or secrets.token_hex(16)
        try:
            operation = f"POST {self._scope['path']}"
            parent = trace_context(Headers(raw=self._scope["headers"]))
            with (
                Carried(named, operation, parent) as timeline,
                self._opened(named, operation) as self._account,
                holding_places(),
            ):
                await self._app(self._scope, self._receive, self._send)
                timeline.cancelled = self._left
                if self._account is not None:
                    self._account.left = not self._over.is_set()
        except Exception as error:
            logger.warning("%s: the app broke: %s", self._scope["path"], raised_at(error))
        finally:
            self._over.set()
        return InProcessAnswer(self._status, self._headers, bytes(self._answer))

    def _opened(self, named: str, operation: str) -> AbstractContextManager[Account | None]:
        return nullcontext() if self._once is None else account_book.account(named, operation, once=self._once)

    async def leave(self, running: asyncio.Task[InProcessAnswer]) -> None:
        self._left = not self._over.is_set()
        self._over.set()
        if self._listening:
            # Cancelled as well, it would leave at once, and what it has begun would not.
            await asyncio.wait({running}, timeout=WINDS_UP_S)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        self._listening += 1
        try:
            await self._over.wait()
        finally:
            self._listening -= 1
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self._account is not None:
            self._account.error |= message.get("status", OK) >= BAD_REQUEST
            self._account.settle()
        if self._heard is not None:
            self._heard(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = Headers(raw=list(message.get("headers", ())))
        elif message["type"] == "http.response.body":
            if self._heard is None:
                self._answer += message.get("body", b"")
            if not message.get("more_body"):
                self._over.set()
