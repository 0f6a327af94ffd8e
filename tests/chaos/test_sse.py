from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from hycluster.chaos.sse import event_lines

ODD = "next\x85line paragraph\u2028 form\x0cfeed"


class Pieces(httpx.AsyncByteStream):
    """A body that comes in pieces of so many bytes."""

    def __init__(self, body: bytes, size: int) -> None:
        self._body, self._size = body, size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), self._size):
            yield self._body[start : start + self._size]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
async def test_a_line_ends_where_an_event_does(size: int, end: str) -> None:
    lines = [f"data: {json.dumps({'text': ODD}, ensure_ascii=False)}", "", "data: [DONE]"]
    answer = httpx.Response(200, stream=Pieces(end.join([*lines, ""]).encode(), size))
    assert [line async for line in event_lines(answer)] == lines


async def test_httpx_ends_it_within_a_text() -> None:
    """If this fails, httpx does it right and the module can go."""
    answer = httpx.Response(200, stream=Pieces(f"data: {ODD}\n".encode(), 1000))
    assert len([line async for line in answer.aiter_lines()]) > 1
