"""What a request to the HTTP ingress may bring: how much, and how slowly; and how much all of them together."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Mapping

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.errors import kind_of, too_many_members
from hycluster.ingress.errors import KIND_HEADER, answer_http_error
from hycluster.ingress.json_shape import JsonShape

# These only tokenize, and vLLM sets them no bound; the ingress process has one thread a model for that, and a MiB takes
# it about a second. 4 MiB hold 256k tokens.
TOKENIZED_PATHS = {"/tokenize": 4 << 20, "/v1/messages/count_tokens": 4 << 20}


class BodyLimit:
    """ASGI middleware: a request's body has a bound, whether or not it says its length.

    Args:
        max_bytes: of one body.
        max_total_bytes: of the bodies of all requests in work; what is over it is shed with 429.
        stall_s: how long the next piece of a body may take.
        max_members: of a JSON body (:class:`JsonShape`); where bodies are nothing but JSON.
        paths: smaller bounds on bodies, by path.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        *,
        max_total_bytes: int | None = None,
        stall_s: float | None = None,
        max_members: int | None = None,
        paths: Mapping[str, int] = {},
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_total_bytes = max_total_bytes
        self.stall_s = stall_s
        self.max_members = max_members
        self.paths = paths
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        max_bytes = min(self.max_bytes, self.paths.get(scope["path"], self.max_bytes))
        most = math.inf if self.max_members is None else self.max_members
        shape = JsonShape()
        seen, complete, answering = 0, False, False
        refused: HTTPException | None = None

        # FastAPI's kind is the only one that its reading of a body lets through.
        def refuse(status: int, why: str, **headers: str) -> HTTPException:
            nonlocal refused
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            refused = HTTPException(status, why, {**named, "Connection": "close"})
            return refused

        def too_large() -> HTTPException:
            return refuse(413, f"body: is over the limit of {max_bytes} bytes")

        async def counted() -> Message:
            nonlocal seen, complete
            try:
                # Once it is there, what the app waits for is the client's going.
                async with asyncio.timeout(None if complete else self.stall_s):
                    message = await receive()
            except TimeoutError:
                raise refuse(408, f"body: nothing came for {self.stall_s} s") from None
            size = len(message.get("body", b""))
            complete = not message.get("more_body")
            seen += size
            self._held += size
            if seen > max_bytes:
                raise too_large()
            if self.max_total_bytes is not None and self._held > self.max_total_bytes:
                why = f"body: those of all requests in work are over the limit of {self.max_total_bytes} bytes"
                raise refuse(429, why, Retry_After="1")
            if self.max_members is not None:
                shape.feed(message.get("body", b""))
                if shape.members > most:
                    error = too_many_members("body", most)
                    raise refuse(error.http_status, error.message, **{KIND_HEADER: kind_of(error).__name__})
            return message

        # Called for each token of each stream, as are those of other layers: they hand on what is to be awaited.
        def watched(message: Message) -> Awaitable[None]:
            nonlocal answering
            answering = True
            return send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if declared.isdigit() and int(declared[:20]) > max_bytes:
                raise too_large()
            await self.app(scope, counted, watched)
        except HTTPException as error:
            # vLLM's app answers this itself, in the same form, where it was the one that read.
            if error is not refused or answering:
                raise
            await (await answer_http_error(Request(scope), error))(scope, receive, send)
        finally:
            self._held -= seen
