from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


async def last_event(status: str) -> Any:
    from vllm.entrypoints.openai.responses.protocol import (
        ResponseCompletedEvent,
        ResponseInProgressEvent,
        ResponsesRequest,
        ResponsesResponse,
    )
    from vllm.sampling_params import SamplingParams

    from hycluster.engine.patches.truncated_responses import patch_responses

    def response(said: Any) -> ResponsesResponse:
        return ResponsesResponse.from_request(
            ResponsesRequest.model_validate({"model": "m", "input": "hi"}),
            SamplingParams(max_tokens=3),
            model_name="m",
            created_time=1,
            output=[],
            status=said,
            usage=None,
        )

    async def stream(request: str, *, created_time: int) -> AsyncIterator[Any]:
        assert (request, created_time) == ("asked", 1)
        yield ResponseInProgressEvent(type="response.in_progress", sequence_number=1, response=response("in_progress"))
        yield ResponseCompletedEvent(type="response.completed", sequence_number=7, response=response(status))

    kept: list[Any] = []

    async def again(response_id: str, starting_after: int | None) -> AsyncIterator[Any]:
        assert (response_id, starting_after) == ("r", None)
        for event in kept:
            yield event
            if event.type == "response.completed":
                return
        await asyncio.Event().wait()

    handler: Any = SimpleNamespace(responses_stream_generator=stream, responses_background_stream_generator=again)
    patch_responses(handler)
    kept += [event async for event in handler.responses_stream_generator("asked", created_time=1)]
    assert [event.type for event in kept[:-1]] == ["response.in_progress"]
    async with asyncio.timeout(PATIENCE_S):
        assert [event async for event in handler.responses_background_stream_generator("r", None)] == kept
    return kept[-1]


async def test_a_stream_that_was_cut_short_says_so() -> None:
    from openai.types.responses import ResponseIncompleteEvent

    event = await last_event("incomplete")
    assert (event.type, event.sequence_number, event.response.status) == ("response.incomplete", 7, "incomplete")
    # What openai's client makes of it.
    seen = ResponseIncompleteEvent.model_validate_json(event.model_dump_json(by_alias=True))
    assert seen.response.incomplete_details is not None
    assert seen.response.incomplete_details.reason == "max_output_tokens"


async def test_a_whole_one_is_completed() -> None:
    assert (await last_event("completed")).type == "response.completed"


def test_vllms_own_still_says_completed() -> None:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    source = inspect.getsource(OpenAIServingResponses)
    assert "response.incomplete" not in source
    assert "self.responses_stream_generator(" in source
    assert "self.responses_background_stream_generator(" in source
