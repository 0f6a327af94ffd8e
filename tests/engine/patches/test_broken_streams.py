"""What real handlers say: ``tests/ingress/test_api.py``."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


async def pieces(*said: str) -> AsyncIterator[str]:
    for piece in said:
        yield piece


async def test_a_stream_of_messages_ends_with_the_chats_error() -> None:
    from hycluster.engine.patches.broken_streams import patch_message_stream

    async def convert(chat: AsyncIterator[str]) -> AsyncIterator[str]:
        async for piece in chat:
            yield f"converted {piece}"

    handler: Any = SimpleNamespace(message_stream_converter=convert)
    patch_message_stream(handler, lambda status: f"type of {status}")
    broken = pieces("data: 1", 'data: {"error": {"message": "gone", "code": 503}}\n\n', "data: [DONE]")
    *events, last = [event async for event in handler.message_stream_converter(broken)]
    assert events == ["converted data: 1"]
    assert last.startswith("event: error\ndata: ")
    said = {"type": "error", "error": {"type": "type of 503", "message": "gone"}}
    assert json.loads(last.partition("data: ")[2]) == said
    whole = [event async for event in handler.message_stream_converter(pieces("data: 1", "data: [DONE]"))]
    assert whole == ["converted data: 1", "converted data: [DONE]"]


class Event:
    def __init__(self, number: int) -> None:
        self.sequence_number = number
        self.response = SimpleNamespace(model_dump=lambda **_: {"id": "r", "status": "in_progress"})


async def failing(begins: int, error: Exception) -> Any:
    """The last event of a response that fails so after so many."""
    from hycluster.engine.patches.broken_streams import patch_response_stream

    async def stream(request: str) -> AsyncIterator[Any]:
        for number in range(begins):
            yield Event(number)
        raise error

    handler: Any = SimpleNamespace(responses_stream_generator=stream)
    patch_response_stream(handler)
    events = [event async for event in handler.responses_stream_generator("asked")]
    assert len(events) == begins + 1
    return events[-1]


async def test_a_response_that_breaks_has_failed() -> None:
    from vllm.exceptions import GenerationError

    from hycluster.gateway.pool_errors import PoolInvalidInput, PoolUnavailable

    # As vLLM does with those: what it makes an event of is none.
    theirs = ValueError("no such event")
    theirs.__context__ = GenerationError("Internal server error")
    for error, code, message in (
        (PoolUnavailable("gone"), "server_error", "gone"),
        (PoolInvalidInput("grammar: allows nothing"), "invalid_prompt", "grammar: allows nothing"),
        (theirs, "server_error", "Internal server error"),
    ):
        last = await failing(2, error)
        assert (last.type, last.sequence_number) == ("response.failed", 2)
        assert last.response == {"id": "r", "status": "failed", "error": {"code": code, "message": message}}
    with pytest.raises(PoolUnavailable):
        await failing(0, PoolUnavailable("gone"))


def test_vllms_own_still_say_nothing_of_it() -> None:
    from pydantic import TypeAdapter, ValidationError
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.protocol import StreamingResponsesResponse
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    converting = inspect.getsource(AnthropicServingMessages.message_stream_converter)
    assert "ChatCompletionStreamResponse.model_validate_json(" in converting
    assert '"error"' not in converting.partition("except Exception")[0].replace('type="error"', "").replace(
        'wrap_data_with_event(data, "error")', ""
    )
    assert 'yield f"data: {data}\\n\\n"' in inspect.getsource(OpenAIServingChat.chat_completion_stream_generator)
    assert "response.failed" not in inspect.getsource(OpenAIServingResponses)
    with pytest.raises(ValidationError):
        TypeAdapter(StreamingResponsesResponse).validate_json('{"error": {"message": "x", "code": 500}}')
