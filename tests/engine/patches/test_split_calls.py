from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]

FIRST = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SECOND = '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def pieces(chunks: list[str], *, patched: bool = True) -> list[list[Any]]:
    """By chunk, what a parser of vLLM's hands out: with the patch, and as vLLM does by itself."""
    from vllm.parser.abstract_parser import DelegatingParser
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    class Parser(DelegatingParser):
        tool_parser_cls = Hermes2ProToolParser

    request: Any = SimpleNamespace(
        tool_choice="auto", structured_outputs=None, tools=[{}], messages=[], include_reasoning=True
    )
    parser = Parser(object())  # type: ignore[arg-type]
    parse: Any = DelegatingParser.parse_delta
    parse = parse if patched else parse.__wrapped__
    said = []
    for number, chunk in enumerate(chunks):
        message = parse(parser, chunk, [number], request, [], finished=number + 1 == len(chunks))
        said.append(list(message.tool_calls) if message is not None else [])
    return said


def told(chunks: list[list[Any]]) -> list[list[tuple[int, str | None, str | None]]]:
    return [[(each.index, each.function.name, each.function.arguments) for each in chunk] for chunk in chunks]


def test_what_a_chunk_has_of_a_call_is_one_piece() -> None:
    assert told(pieces([FIRST])) == [[(0, "weather", '{"city": "Paris"}')]]
    ours = pieces([FIRST + SECOND])
    assert told(ours) == [[(0, "weather", '{"city": "Paris"}'), (1, "time", "{}")]]
    assert all(each.id and each.type == "function" for each in ours[0])
    # vLLM's own still does not: else the patch is no longer needed.
    assert told(pieces([FIRST], patched=False)) == [[(0, "weather", None), (0, None, '{"city": "Paris"}')]]


@pytest.mark.parametrize("length", [1, 7, 30])
def test_all_else_is_left_as_it_is(length: int) -> None:
    text = FIRST + SECOND
    chunks = [text[start : start + length] for start in range(0, len(text), length)]
    whole: dict[int, tuple[str, str]] = {}
    for chunk in told(pieces(chunks)):
        assert len({index for index, _, _ in chunk}) == len(chunk)
        for index, name, arguments in chunk:
            begun = whole.get(index, ("", ""))
            whole[index] = begun[0] + (name or ""), begun[1] + (arguments or "")
    assert whole == {0: ("weather", '{"city": "Paris"}'), 1: ("time", "{}")}
