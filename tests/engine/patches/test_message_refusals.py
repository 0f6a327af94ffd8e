from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


async def test_a_refusal_is_given_with_its_status() -> None:
    from hycluster.engine.patches.message_refusals import patch_messages
    from hycluster.gateway.pool_errors import PoolInvalidInput, PoolOverloaded

    async def create_messages(request: Any, _: Any) -> Any:
        if isinstance(request, Exception):
            raise request
        return request

    handler: Any = SimpleNamespace(create_messages=create_messages)
    patch_messages(handler)
    given = await handler.create_messages(PoolOverloaded("model: 'm' is full", 3.0), None)
    assert (given.error.code, given.error.message) == (429, "model: 'm' is full")
    given = await handler.create_messages(PoolInvalidInput("prompt: is too long"), None)
    assert (given.error.code, given.error.message) == (400, "prompt: is too long")
    assert await handler.create_messages("answer", None) == "answer"
    with pytest.raises(ValueError, match="not ours"):
        await handler.create_messages(ValueError("not ours"), None)


def test_vllms_route_still_logs_what_is_raised() -> None:
    from vllm.entrypoints.anthropic import api_router
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    source = inspect.getsource(api_router.create_messages)
    assert 'logger.exception("Error in create_messages' in source
    assert "generator = await handler.create_messages(request, raw_request)" in source
    assert "if isinstance(generator, ErrorResponse):" in source
    assert list(inspect.signature(AnthropicServingMessages.create_messages).parameters) == [
        "self",
        "request",
        "raw_request",
    ]
