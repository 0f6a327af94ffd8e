"""How a replica tells which KV blocks it has stored and dropped: a frame before those of a step's outputs.

A block is named by the last 64 bits of vLLM's hash of it and of all before it, as its events have it with
``VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES``. A frame has the difference that a step made, and no order within: what was
stored and dropped again is in neither part. One that is ``whole`` takes the place of all that was said before: the
first one to a gateway, and the first one after the prefix cache was reset.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hycluster.engine.protocol import Frame

Names = NDArray[np.uint64]

NAME_BYTES = 8
# Big-endian, as vLLM makes numbers of its hashes.
_NAME = np.dtype(">u8")
# What no msgpack of an array begins with, as all outputs do.
_MARK = b"K"
# Mark, whether it is whole, epoch, count of stored blocks; their names and those of the dropped ones follow.
_HEAD = struct.Struct(">c?QI")


@dataclass(frozen=True, slots=True)
class BlockChanges:
    """What became of a replica's KV blocks.

    Attributes:
        epoch: another one after each start of an engine and each reset of its prefix cache.
        whole: ``stored`` is all that there is.
        stored, dropped: names, each ``[blocks]``.
    """

    epoch: int
    whole: bool
    stored: Names
    dropped: Names


def encode_changes(epoch: int, stored: Iterable[bytes], dropped: Iterable[bytes] = (), *, whole: bool = False) -> bytes:
    """A frame, of names of ``NAME_BYTES`` each."""
    there = b"".join(stored)
    return b"".join((_HEAD.pack(_MARK, whole, epoch, len(there) // NAME_BYTES), there, *dropped))


def is_changes(frame: Frame) -> bool:
    """Whether a frame is such a one, and not of outputs."""
    return bytes(memoryview(frame)[:1]) == _MARK


def decode_changes(frame: Frame) -> BlockChanges:
    """Read a frame that :func:`is_changes`.

    Raises:
        ValueError, struct.error: it is cut short.
    """
    _, whole, epoch, stored = _HEAD.unpack_from(frame)
    names = np.frombuffer(frame, _NAME, offset=_HEAD.size).astype(np.uint64)
    if len(names) < stored:
        raise ValueError(f"{stored} blocks stored, and names of {len(names)}")
    return BlockChanges(epoch, whole, names[:stored], names[stored:])
