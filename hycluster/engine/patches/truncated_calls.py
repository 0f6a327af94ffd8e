"""A tool call that was forced and cut short is no text.

What: where the output could be nothing but calls and none is complete, an answer that is not streamed has no content,
as a streamed one has none.
Why: vLLM hands out what the model wrote of the call, with the parser's marks (``<tool_call>``), as the content.
Upstream: vllm-project/vllm#47903 (open).
Version: vLLM 0.32.0. Applied where a chat's answers are read, for both ingresses and batch jobs. Watched by
``tests/engine/patches/test_truncated_calls.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from typing import Any

from openai.types.responses import ToolChoiceCustom, ToolChoiceFunction
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam
from vllm.parser.abstract_parser import DelegatingParser

NAMED = (ChatCompletionNamedToolChoiceParam, ToolChoiceCustom, ToolChoiceFunction)


def patch_truncated_calls() -> None:
    """Have vLLM's parsers leave out what was written of a forced call; once is enough."""
    extract: Any = DelegatingParser._extract_tool_calls
    if hasattr(extract, "__wrapped__"):
        return

    @functools.wraps(extract)
    def extracted(self: DelegatingParser, content: str | None, request: Any, *rest: Any, **named: Any) -> Any:
        calls, left = extract(self, content, request, *rest, **named)
        return (calls, None) if not calls and _only_calls(request) else (calls, left)

    DelegatingParser._extract_tool_calls = extracted  # type: ignore[method-assign]


def _only_calls(request: Any) -> bool:
    """Whether the grammar of the output had room for nothing else."""
    form = request.structured_outputs
    held = form is not None and form.structural_tag is not None
    return held and (request.tool_choice == "required" or isinstance(request.tool_choice, NAMED))
