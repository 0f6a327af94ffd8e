"""What a chunk of a stream has of a tool call is one piece.

What: pieces of the same call that come in one chunk are put together: name, id and arguments.
Why: vLLM's parsers put the name and the first arguments side by side, as two entries of one ``index``, wherever a chunk
holds more than a token: where an engine is faster than the caller reads. OpenAI's API has one entry a call and chunk,
and clients read the first alone (instructor's partial answers, seen with 1.17): they lose the arguments.
Upstream: not reported.
Version: vLLM 0.32.0. Applied where a chat's answers are read, for both ingresses and batch jobs. Watched by
``tests/engine/patches/test_split_calls.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, DeltaToolCall
from vllm.parser.abstract_parser import DelegatingParser


def patch_split_calls() -> None:
    """Have vLLM's parsers hand out one piece a call and chunk; once is enough."""
    parse: Any = DelegatingParser.parse_delta
    if hasattr(parse, "__wrapped__"):
        return

    @functools.wraps(parse)
    def parsed(self: DelegatingParser, *arguments: Any, **named: Any) -> DeltaMessage | None:
        message: DeltaMessage | None = parse(self, *arguments, **named)
        if message is not None and len(message.tool_calls or ()) > 1:
            message.tool_calls = _together(message.tool_calls)
        return message

    DelegatingParser.parse_delta = parsed  # type: ignore[method-assign]


def _together(pieces: list[DeltaToolCall]) -> list[DeltaToolCall]:
    calls: dict[int, DeltaToolCall] = {}
    for piece in pieces:
        begun = calls.setdefault(piece.index, piece)
        if begun is piece or piece.function is None:
            continue
        if begun.function is None:
            begun.function = piece.function
            continue
        begun.id = begun.id or piece.id
        begun.function.name = begun.function.name or piece.function.name
        if piece.function.arguments:
            begun.function.arguments = (begun.function.arguments or "") + piece.function.arguments
    return list(calls.values())
