"""The Responses API refuses tools of which nobody would read the calls.

What: a request with tools, to a model without a parser for tool calls, is refused; the error says what to set.
Why: vLLM's handler of ``/v1/chat/completions`` refuses it; that of ``/v1/responses`` tells the model of the tools and
answers its calls as text, which no client takes for calls.
Upstream: none filed.
Version: vLLM 0.32.0. Applied by the HTTP ingress on the handler of each model's app. Watched by
``tests/engine/patches/test_unread_tools.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError


def patch_tools(handler: Any, model: str) -> None:
    """Have a handler refuse them.

    Args:
        handler: vLLM's ``OpenAIServingResponses``.
        model: its name, for the error.
    """
    answer = handler.create_responses
    # Harmony has its calls read in any case.
    if handler.use_harmony or (handler.parser is not None and handler.parser.tool_parser_cls is not None):
        return

    @functools.wraps(answer)
    async def read(request: Any, *rest: Any) -> Any:
        if request.tools and request.tool_choice != "none":
            raise VLLMValidationError(
                f"tools: model {model!r} has no parser for tool calls: none is known for it by itself; set"
                ' models[].api.tool_call_parser, or tool_choice to "none"',
                parameter="tools",
            )
        return await answer(request, *rest)

    handler.create_responses = read
