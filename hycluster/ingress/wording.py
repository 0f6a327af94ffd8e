"""vLLM's errors by the names that its arguments have in the settings, as its own flags are nowhere to be set here; and
with OpenAI's code where clients decide on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.settings.api import in_our_words

# What is longer is no error that tells of a flag.
MOST_BYTES = 64 << 10
# By it LangChain and others know a prompt that they have to shorten; vLLM says 400 there, as everywhere.
TOO_LONG_CODE = "context_length_exceeded"
_TOO_LONG = "This model's maximum context length is"


class InOurWords:
    """ASGI middleware around vLLM's app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun: Message | None = None

        async def tell(message: Message) -> None:
            nonlocal begun
            if begun is None:
                begun = message
                return
            start, begun = begun, None
            body = message.get("body", b"")
            if len(body) <= MOST_BYTES and not message.get("more_body"):
                body = _told(body)
                headers = [(k, v) for k, v in start.get("headers", ()) if k.lower() != b"content-length"]
                start = {**start, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
            await send(start)
            await send({**message, "body": body})

        # Called for each token of each stream.
        def told(message: Message) -> Awaitable[None]:
            wrong = message["type"] == "http.response.start" and message["status"] >= 400
            return tell(message) if wrong or begun is not None else send(message)

        await self._app(scope, receive, told)


def _told(body: bytes) -> bytes:
    if b"--" in body:
        body = in_our_words(body.decode(errors="replace")).encode()
    if _TOO_LONG.encode() in body:
        with contextlib.suppress(ValueError):
            answer = json.loads(body)
            if (error := answer.get("error")) and str(error.get("message")).startswith(_TOO_LONG):
                error["code"] = TOO_LONG_CODE
                body = json.dumps(answer).encode()
    return body
