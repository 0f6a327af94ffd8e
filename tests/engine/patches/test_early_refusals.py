"""What real handlers refuse: ``tests/ingress/test_api.py``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


def patched(answer: Any, checked: list[str], refusal: Exception | None = None) -> Any:
    """A handler that answers with this, and what has been checked for it."""
    from hycluster.engine.patches.early_refusals import patch_streams

    async def create(request: str) -> Any:
        checked.append(f"asked {request}")
        return answer

    @contextlib.contextmanager
    def checking() -> Iterator[Any]:
        async def check_rest() -> None:
            checked.append("rest")
            if refusal is not None:
                raise refusal

        yield check_rest
        checked.append("over")

    handler = SimpleNamespace(create_completion=create)
    patch_streams(handler, checking, lambda *_: None)
    return handler


async def stream(read: list[str]) -> AsyncIterator[str]:
    try:
        read.append("begun")
        yield "token"
    finally:
        read.append("closed")


async def test_a_stream_is_given_when_all_is_checked() -> None:
    checked: list[str] = []
    answer = await patched(stream([]), checked).create_completion("a")
    assert checked == ["asked a", "rest", "over"]
    assert [token async for token in answer] == ["token"]


async def test_a_stream_that_is_refused_never_begins() -> None:
    read: list[str] = []
    given = stream(read)
    with pytest.raises(ValueError, match="no such grammar"):
        await patched(given, [], ValueError("no such grammar")).create_completion("a")
    assert [token async for token in given] == []
    assert not read


async def test_what_is_no_stream_is_checked_as_it_is_made() -> None:
    checked: list[str] = []
    assert await patched("whole", checked, ValueError()).create_completion("a") == "whole"
    assert checked == ["asked a", "over"]


async def test_a_turn_and_beams_are_checked_when_they_are_asked_for() -> None:
    from vllm.sampling_params import BeamSearchParams

    from hycluster.engine.patches.early_refusals import patch_streams

    asked: list[Any] = []

    def check(prompt: Any, params: Any, request_id: str, **named: Any) -> str:
        asked.append((prompt, params if isinstance(params, str) else params.logprobs, request_id, named))
        return f"{prompt} checked"

    async def turn(**named: Any) -> AsyncIterator[Any]:
        yield named

    handler: Any = SimpleNamespace(_generate_with_builtin_tools=turn, beam_search=turn)
    patch_streams(handler, contextlib.nullcontext, check)  # type: ignore[arg-type]
    first = {"request_id": "r", "engine_input": "p", "sampling_params": "s", "context": "c", "priority": 3}
    given = handler._generate_with_builtin_tools(**first)
    assert asked == [("p", "s", "r_0", {"priority": 3})]
    assert await anext(given) == first | {"engine_input": "p checked"}
    beams = {"prompt": "p", "request_id": "r", "params": BeamSearchParams(beam_width=3, max_tokens=2)}
    given = handler.beam_search(**beams, session_id="s")
    assert asked[1:] == [("p", 6, "r", {"session_id": "s"})]
    assert await anext(given) == beams | {"session_id": "s"}


def test_vllms_own_still_checks_behind_the_status() -> None:
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert "await self.add_request(" in inspect.getsource(AsyncLLM.generate)
    assert "generator = self.engine_client.generate(" in inspect.getsource(OpenAIServingChat._create_chat_completion)
    for late in OpenAIServingResponses._generate_with_builtin_tools, BeamSearchOnlineMixin.beam_search:
        assert inspect.isasyncgenfunction(late)
    beams = inspect.getsource(BeamSearchOnlineMixin.beam_search)
    assert "logprobs_num = 2 * beam_width" in beams
