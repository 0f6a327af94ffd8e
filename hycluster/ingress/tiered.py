"""The HTTP ingress's side of service tiers: ``service_tier`` in a body, and in the answer what it got."""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.errors import InvalidInput
from hycluster.gateway.tiers import ASKED, ServiceTier, served_as, tier_for
from hycluster.ingress.dispatch import read_on
from hycluster.ingress.errors import answer_error

# Anthropic's has other tiers.
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
FIELD = "service_tier"
# As vLLM's app writes it: what it was told, or nothing. Within a text there would be a backslash before the quotes.
_WRITTEN = tuple(f'"{FIELD}":{json.dumps(said)}'.encode() for said in (None, *ASKED))
# How it begins each part of a stream that has no such field.
_CHUNK = b'data: {"id"'


class Tiered:
    """ASGI middleware around the app of all models. What names no tier it leaves alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        body, receive = await read_on(receive)
        asked = _asked(body)
        if asked is None:
            await self._app(scope, receive, send)
            return
        try:
            tier = tier_for(asked)
        except InvalidInput as error:
            await (await answer_error(None, error))(scope, receive, send)
            return
        with served_as(tier):
            await self._app(scope, receive, _Told(send, tier))


class _Told:
    """``send`` of an app whose answer is to say which tier it was."""

    def __init__(self, send: Send, tier: ServiceTier) -> None:
        self._send = send
        self._written = f'"{FIELD}":"{tier}"'.encode()
        self._start: Message | None = None
        self._whole = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is None:
            body = message.get("body", b"")
            if body.startswith((b"data: ", b"event: ")):
                message = {**message, "body": self._in_stream(body)}
        elif self._start is not None:
            self._whole += message.get("body", b"")
            if message.get("more_body"):
                return
            start, whole = self._start, self._replaced(self._whole)
            MutableHeaders(scope=start)["content-length"] = str(len(whole))
            await self._send(start)
            message = {"type": "http.response.body", "body": whole, "more_body": False}
        await self._send(message)

    def _in_stream(self, body: bytes) -> bytes:
        if body.startswith(_CHUNK):
            return body.replace(_CHUNK, b"data: {" + self._written + b',"id"')
        return self._replaced(body)

    def _replaced(self, body: bytes) -> bytes:
        for written in _WRITTEN:
            body = body.replace(written, self._written)
        return body


def _asked(body: bytes) -> object:
    """What a body asks for; None if nothing."""
    if FIELD.encode() not in body:
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        # The app refuses it.
        return None
    return found.get(FIELD) if isinstance(found, dict) else None
