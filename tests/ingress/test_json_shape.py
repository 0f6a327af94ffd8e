from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.ingress.json_shape import JsonShape

TEXTS = st.text('a"\\{}[]:, é\n', max_size=8)
JSON = st.recursive(TEXTS | st.integers(), lambda j: st.lists(j, max_size=4) | st.dictionaries(TEXTS, j, max_size=4))


def members(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(members, value.values()))
    return 1 + sum(map(members, value)) if isinstance(value, list) else 0


def fed(body: bytes, size: int) -> int:
    shape = JsonShape()
    for start in range(0, len(body), size):
        shape.feed(body[start : start + size])
    return shape.members


@given(JSON, st.booleans(), st.integers(1, 20))
def test_it_is_counted_whatever_the_pieces(value: Any, ascii_only: bool, size: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert fed(body, size) == fed(body, len(body)) == members(value)


def test_no_encoding_hides_any() -> None:
    # U+2222 has two bytes like a quote.
    value = ["\u2222", [{"a": 1}] * 100, "\u6122\u2261"]
    assert fed(json.dumps(value, ensure_ascii=False).encode("utf-16"), 7) >= members(value)


@pytest.mark.parametrize("body", [b'"' * (4 << 20), b'"' + b'\\"' * (2 << 20), b'["", ' * (1 << 20), b"\\" * (4 << 20)])
def test_none_takes_long(body: bytes) -> None:
    def seconds(piece: bytes) -> float:
        begun = time.thread_time()
        fed(piece, 64 << 10)
        return time.thread_time() - begun

    # Not by the square of the length, which is sixteen times as much.
    assert seconds(body) < 8 * min(seconds(body[: len(body) // 4]) for _ in range(3)) + 0.2
