"""A stream of the Responses API that was cut short ends with ``response.incomplete``.

What: the last event of a stream whose response is incomplete is ``response.incomplete``; a stream that is read again
ends with it, too.
Why: vLLM's is ``response.completed`` whatever became of it, and callers go by the event: they take half an answer for a
whole one.
Upstream: vllm-project/vllm#45386 (open).
Version: vLLM 0.32.0. Applied by the HTTP ingress on the handler of each model's app. Watched by
``tests/engine/patches/test_truncated_responses.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import contextlib
import functools
from collections.abc import AsyncGenerator
from typing import Any

from openai.types.responses import ResponseIncompleteEvent
from vllm.entrypoints.openai.responses.protocol import ResponseCompletedEvent, ResponsesResponse


class IncompleteEvent(ResponseIncompleteEvent):
    """With vLLM's kind of response, as vLLM's other events have it."""

    response: ResponsesResponse  # type: ignore[assignment]


def patch_responses(handler: Any) -> None:
    """Have a handler end its streams with what has become of them.

    Args:
        handler: vLLM's ``OpenAIServingResponses``.
    """
    stream, again = handler.responses_stream_generator, handler.responses_background_stream_generator

    @functools.wraps(stream)
    async def told(*asked: Any, **named: Any) -> AsyncGenerator[Any, None]:
        async for event in stream(*asked, **named):
            if isinstance(event, ResponseCompletedEvent) and event.response.status == "incomplete":
                yield IncompleteEvent(
                    type="response.incomplete", sequence_number=event.sequence_number, response=event.response
                )
            else:
                yield event

    @functools.wraps(again)
    async def told_again(*asked: Any, **named: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(again(*asked, **named)) as events:
            async for event in events:
                yield event
                # vLLM's waits for what it knows as the last one.
                if isinstance(event, IncompleteEvent):
                    return

    handler.responses_stream_generator = told
    handler.responses_background_stream_generator = told_again
