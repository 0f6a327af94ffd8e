"""What breaks a stream is said in it, as its API has it.

What: a stream of ``/v1/messages`` ends with an ``error`` event of what has happened, one of ``/v1/responses`` with
``response.failed``.
Why: vLLM makes the one out of its chat's stream, in which an error is a piece that it can't read: callers hear of two
validation errors of its own. The other has no event for an error that is none of the engine's, and for those makes one
that is none of its events: its connection is cut, which clients take for the network's fault.
Upstream: none filed.
Version: vLLM 0.32.0. Applied by the HTTP ingress on the handlers of each model's app. Watched by
``tests/engine/patches/test_broken_streams.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import contextlib
import functools
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Literal

from pydantic import BaseModel
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError

logger = logging.getLogger(__name__)

# How vLLM's chat tells an error in a stream.
_ERROR = 'data: {"error"'
# The first status that is no fault of the request's.
_SERVERS = 500


class FailedEvent(BaseModel):
    """With a response of vLLM's own kind, which has no ``error``."""

    type: Literal["response.failed"] = "response.failed"
    sequence_number: int
    response: dict[str, Any]


def patch_message_stream(handler: Any, type_of: Callable[[int], str]) -> None:
    """Have a stream of messages say what broke it.

    Args:
        handler: vLLM's ``AnthropicServingMessages``.
        type_of: an error's type in Anthropic's API, by its status.
    """
    convert = handler.message_stream_converter

    @functools.wraps(convert)
    async def told(chat: AsyncGenerator[str, None]) -> AsyncIterator[str]:
        error: dict[str, Any] | None = None

        async def until_it_breaks() -> AsyncIterator[str]:
            nonlocal error
            async for piece in chat:
                if piece.startswith(_ERROR):
                    error = json.loads(piece.removeprefix("data: "))["error"]
                    return
                yield piece

        async with contextlib.aclosing(convert(until_it_breaks())) as events:
            async for event in events:
                yield event
        if error is not None:
            said = {"type": "error", "error": {"type": type_of(error["code"]), "message": error["message"]}}
            yield f"event: error\ndata: {json.dumps(said)}\n\n"

    handler.message_stream_converter = told


def patch_response_stream(handler: Any) -> None:
    """Have a stream of a response say what broke it.

    Args:
        handler: vLLM's ``OpenAIServingResponses``.
    """
    stream = handler.responses_stream_generator

    @functools.wraps(stream)
    async def told(*asked: Any, **named: Any) -> AsyncGenerator[Any, None]:
        begun, number = None, 0
        try:
            async with contextlib.aclosing(stream(*asked, **named)) as events:
                async for event in events:
                    begun, number = begun or getattr(event, "response", None), event.sequence_number
                    yield event
        except Exception as error:
            if begun is None:
                raise
            # Of the engine's own errors vLLM fails to make an event.
            cause = error.__context__ if isinstance(error.__context__, GenerationError) else error
            logger.warning("a response that had begun failed: %s", type(cause).__name__)
            yield FailedEvent(sequence_number=number + 1, response=_failed(begun, cause))

    handler.responses_stream_generator = told


def _failed(begun: Any, error: Exception) -> dict[str, Any]:
    said = create_error_response(error).error
    reason = {"code": "server_error" if said.code >= _SERVERS else "invalid_prompt", "message": said.message}
    return {**begun.model_dump(mode="json", by_alias=True), "status": "failed", "error": reason}
