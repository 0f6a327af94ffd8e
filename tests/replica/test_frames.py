"""Long frames in pieces, and what is none."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from hycluster.engine.protocol import Frame
from hycluster.replica.frames import PARTS, PIECE_BYTES, in_pieces, joined


def there_and_back(frames: Sequence[Frame]) -> list[bytes]:
    first, sizes, *pieces = in_pieces(frames)
    assert first == PARTS
    assert all(memoryview(piece).nbytes <= PIECE_BYTES for piece in pieces)
    return [bytes(frame) for frame in joined(memoryview(sizes), [memoryview(piece) for piece in pieces])]


def test_short_frames_go_as_they_are() -> None:
    frames: list[Frame] = [b"\x00", b"", bytes(PIECE_BYTES), memoryview(b"x")]
    assert in_pieces(frames) is frames


@pytest.mark.parametrize("size", [PIECE_BYTES + 1, 2 * PIECE_BYTES, 2 * PIECE_BYTES + 1])
def test_long_frames_are_put_together_again(size: int) -> None:
    long = np.random.default_rng(0).bytes(size)
    frames: list[Frame] = [b"\x00", long, b"", bytearray(b"short"), long[::-1]]
    assert there_and_back(frames) == [bytes(frame) for frame in frames]


def test_a_tensors_frame() -> None:
    tensor = np.arange(3 * 40_000, dtype=np.float32).reshape(3, -1)
    assert there_and_back([b"\x00", tensor.data]) == [b"\x00", tensor.tobytes()]


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([], []),
        ([3], []),
        ([3], [b"ab"]),
        ([1], [b"a", b"b"]),
        ([1 << 60], [b"a"]),
        ([-1], [b"a"]),
        ([PIECE_BYTES + 1], [b"a", b"b"]),
    ],
)
def test_what_does_not_fit_together_is_refused(sizes: list[int], pieces: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r"pieces|bytes came"):
        joined(memoryview(msgspec.msgpack.encode(sizes)), [memoryview(piece) for piece in pieces])
