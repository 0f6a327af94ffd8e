from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def extracted(choice: Any, text: str, *, held: bool = True) -> tuple[Any, Any]:
    """By a parser of vLLM's: with the patch, and as vLLM does by itself."""
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    class Parser(DelegatingParser):
        tool_parser_cls = Hermes2ProToolParser

    tag = SimpleNamespace(structural_tag="{}") if held else None
    request: Any = SimpleNamespace(tool_choice=choice, structured_outputs=tag, tools=[])
    parser = Parser(object())  # type: ignore[arg-type]
    alone: Any = DelegatingParser._extract_tool_calls.__wrapped__  # type: ignore[attr-defined]
    return parser._extract_tool_calls(text, request, True), alone(parser, text, request, True)


def named() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam

    return ChatCompletionNamedToolChoiceParam(function={"name": "weather"})  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", ["required", named])
@pytest.mark.parametrize("length", [5, 20, 60])
def test_what_was_written_of_a_forced_call_is_no_text(choice: Any, length: int) -> None:
    choice = choice() if callable(choice) else choice
    (calls, content), (_, leaked) = extracted(choice, CALL[:length])
    assert (calls, content) == (None, None)
    # vLLM's own still does: else the patch is no longer needed.
    assert leaked == CALL[:length]


@pytest.mark.parametrize(
    ("choice", "text", "held"),
    [("auto", CALL[:20], True), ("required", "I would rather not.", False), ("required", CALL, True)],
)
def test_all_else_is_left_as_it_is(choice: str, text: str, held: bool) -> None:
    ours, theirs = extracted(choice, text, held=held)
    assert repr(ours[1]) == repr(theirs[1])
    assert [call.name for call in ours[0] or ()] == [call.name for call in theirs[0] or ()]
