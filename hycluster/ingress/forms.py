"""What every answer of the HTTP ingress has, whoever gives it: what lets pages of other origins read it, and an error's
form as the API has it that was asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.ingress.errors import KIND_HEADER, SHOULD_RETRY
from hycluster.ingress.timelines import WithTimelines

MESSAGES = "/v1/messages"
# By status; of others the first digit decides.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# What a page of another origin may read of an answer.
EXPOSED = (
    "Retry-After",
    "Retry-After-Ms",
    SHOULD_RETRY,
    "X-Request-Id",
    KIND_HEADER,
    *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
)
# Made anew with the body.
_OF_A_BODY = {"content-length", "content-type"}


def in_form(app: ASGIApp, allowed_origins: Iterable[str]) -> ASGIApp:
    """The app of an HTTP ingress, around all of its parts."""
    app, origins = AnthropicErrors(WithTimelines(app)), list(allowed_origins)
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )


class AnthropicErrors:
    """ASGI middleware: errors below ``/v1/messages`` as Anthropic's API tells them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == MESSAGES or path.startswith(f"{MESSAGES}/")):
            await self._app(scope, receive, send)
            return
        begun: MutableMapping[str, Any] | None = None
        body = b""

        async def translated(message: Message) -> None:
            nonlocal begun, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                begun = message
            elif begun is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    await _anthropic_error(begun, body)(scope, receive, send)

        await self._app(scope, receive, translated)


def anthropic_type(status: int) -> str:
    """What Anthropic's API calls an error of this status."""
    return ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def _anthropic_error(begun: MutableMapping[str, Any], body: bytes) -> JSONResponse:
    status: int = begun["status"]
    headers = {name: value for name, value in Headers(raw=begun["headers"]).items() if name not in _OF_A_BODY}
    error = {"type": "error", "error": {"type": anthropic_type(status), "message": _message_in(body)}}
    return JSONResponse(error, status_code=status, headers=headers)


def _message_in(body: bytes) -> str:
    """What an error says, be it in OpenAI's form or in Anthropic's."""
    text = body.decode("utf-8", "replace")
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return text
    return str(said)
