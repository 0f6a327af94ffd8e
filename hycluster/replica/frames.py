"""Frames over a bound travel in pieces, so that a replica never has to take a long one in.

libzmq takes in a whole frame, however long its sender says that it is, before it knows who that is. What it takes from
strangers is small because nothing that gateways send is large.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hycluster.engine.protocol import Frame

# A prompt of some 30,000 tokens; most messages are one frame below it.
PIECE_BYTES = 128 << 10
# First frame of a message in pieces; behind it the sizes of the frames, then their pieces.
PARTS = b"P"


def in_pieces(frames: Sequence[Frame]) -> Sequence[Frame]:
    """A message as it travels; itself if all of its frames are short."""
    views = [memoryview(frame) for frame in frames]
    if all(view.nbytes <= PIECE_BYTES for view in views):
        return frames
    pieces: list[Frame] = []
    for view in views:
        if view.nbytes <= PIECE_BYTES:
            pieces.append(view)
        else:
            octets = view.cast("B")
            pieces += [octets[at : at + PIECE_BYTES] for at in range(0, view.nbytes, PIECE_BYTES)]
    return [PARTS, msgspec.msgpack.encode([view.nbytes for view in views]), *pieces]


def joined(sizes: memoryview, pieces: Sequence[memoryview]) -> list[memoryview]:
    """The frames of a message that came in pieces.

    Raises:
        ValueError: the pieces are not what the sizes say.
    """
    frames, rest = [], list(pieces)
    for size in msgspec.msgpack.decode(sizes, type=list[int]):
        count = max(1, -(-size // PIECE_BYTES))
        own, rest = rest[:count], rest[count:]
        frame = own[0] if len(own) == 1 else memoryview(b"".join(own))
        if frame.nbytes != size:
            raise ValueError(f"a frame of {size} bytes came with {frame.nbytes}")
        frames.append(frame)
    if rest or not frames:
        raise ValueError("more pieces than frames")
    return frames
