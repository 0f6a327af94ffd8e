"""The hashes of a prompt's KV blocks as vLLM's ``sha256`` makes them, many blocks in one call.

Pinned to vLLM 0.32.0, whose ``vllm.utils.hashing.sha256`` is SHA-256 of what ``pickle`` writes for a block: the hash
before it, its tokens, its extra keys. Each needs the one before it, so in Python every block costs a call of each of
the two, more than a microsecond: 3 ms for 32,000 tokens in blocks of 16. But all that pickle writes is the same for
each block, except for the hash and the tokens. So a loop that Numba compiles writes these, and has OpenSSL, the one
that Python's ``hashlib`` uses, hash them: a tenth of that. vLLM depends on Numba too. A process pays 1.1 s and 130 MiB
for it, so it is imported when a gateway follows blocks, and by nothing else.

Where that OpenSSL can't be called, or the bytes are not as expected, the caller is told to go by vLLM's function.
``tests/gateway/test_sha256_blocks.py`` compares with it.
"""

from __future__ import annotations

import _hashlib
import ctypes
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.utils.hashing import sha256

from hycluster.engine.patches.pinned import pinned_to
from hycluster.gateway.block_hashes import Hashes, Keys

pinned_to("vllm", "0.32.0", __name__)

Loop = Callable[[NDArray[np.uint32], int, Hashes, Hashes, Hashes, Hashes], None]
# In the bytes that pickle's protocol 5 writes for a block: how many follow, the hash before, the first token.
_LENGTH_AT, _PARENT_AT, _TOKENS_AT = 3, 13, 47
_HEAD_BYTES, _HASH_BYTES, _TOKEN_BYTES = 11, 32, 5
# OpenSSL's `SHA256_CTX` is 112.
_STATE_BYTES = 128
# Shorter tuples are written otherwise, and so are larger tokens, and what is longer than a frame.
_LEAST_TOKENS, _MOST_TOKEN, _MOST_BYTES = 4, (1 << 31) - 1, 60_000


def sha256_hashes(parent: bytes, tokens: NDArray[np.uint32], block_tokens: int, keys: Keys) -> Hashes | None:
    """Hash whole blocks, which have the same extra keys.

    Args:
        parent: the hash before the first one.

    Returns:
        ``[blocks, 32]``; None: vLLM's function has to do it.
    """
    loop = compiled_loop()
    if loop is None or block_tokens < _LEAST_TOKENS or len(parent) != _HASH_BYTES or len(tokens) < block_tokens:
        return None
    head, tail = _around(block_tokens, keys)
    most = _TOKENS_AT + _TOKEN_BYTES * block_tokens + len(tail)
    if most > _MOST_BYTES or int(tokens.max()) > _MOST_TOKEN:
        return None
    return _hash(loop, parent, tokens, block_tokens, head, tail)


def _hash(
    loop: Loop, parent: bytes, tokens: NDArray[np.uint32], block_tokens: int, head: Hashes, tail: Hashes
) -> Hashes:
    message = np.empty(_TOKENS_AT + _TOKEN_BYTES * block_tokens + len(tail), np.uint8)
    message[:_TOKENS_AT] = head
    message[_PARENT_AT : _PARENT_AT + _HASH_BYTES] = np.frombuffer(parent, np.uint8)
    hashes = np.empty((len(tokens) // block_tokens, _HASH_BYTES), np.uint8)
    loop(tokens, block_tokens, tail, message, hashes, np.empty(_STATE_BYTES, np.uint8))
    return hashes


@functools.lru_cache(maxsize=256)
def _around(block_tokens: int, keys: Keys) -> tuple[Hashes, Hashes]:
    """What is before a block's tokens, and what is behind them."""
    # A copy, since Numba takes longer to look at arrays that can't be written to.
    written = np.frombuffer(_pickled(bytes(_HASH_BYTES), (0,) * block_tokens, keys), np.uint8).copy()
    # Each zero takes two bytes.
    return written[:_TOKENS_AT], written[_TOKENS_AT + 2 * block_tokens :]


def _pickled(*parts: Any) -> bytes:
    return pickle.dumps(parts, protocol=pickle.HIGHEST_PROTOCOL)


@functools.cache
def compiled_loop() -> Loop | None:
    """Compiled at the first call; None where it can't be had."""
    # Where the module is built in, it has no file; then OpenSSL's names may not be found.
    library = ctypes.CDLL(getattr(_hashlib, "__file__", None))
    if not hasattr(library, "SHA256_Final"):
        return None
    loop = _compile(library)
    # Numbers that take one, two and four bytes.
    parent, tokens = bytes(range(_HASH_BYTES)), (0, 255, 256, 65_535, 65_536, _MOST_TOKEN)
    got = _hash(loop, parent, np.array(2 * tokens, np.uint32), len(tokens), *_around(len(tokens), None))
    first = sha256((parent, tokens, None))
    return loop if got.tobytes() == first + sha256((first, tokens, None)) else None


def _compile(library: ctypes.CDLL) -> Loop:
    import numba

    begin, update, end = library.SHA256_Init, library.SHA256_Update, library.SHA256_Final
    begin.argtypes = [ctypes.c_void_p]
    update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    end.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def loop(
        tokens: Any, block_tokens: int, tail: Hashes, message: Hashes, hashes: Hashes, state: Hashes
    ) -> None:  # pragma: no cover - compiled
        for block in range(len(hashes)):
            at = _TOKENS_AT
            for token in tokens[block * block_tokens : (block + 1) * block_tokens]:
                # BININT1, BININT2 or BININT, and little-endian as many bytes as it takes. Without branches, which a
                # processor could not foretell: all bytes are written, and what is too much is written over.
                two, four = token > 0xFF, token > 0xFFFF
                message[at] = 0x4B + 2 * two - 3 * four
                message[at + 1] = token & 0xFF
                message[at + 2] = token >> 8 & 0xFF
                message[at + 3] = token >> 16 & 0xFF
                message[at + 4] = token >> 24
                at += 2 + two + 2 * four
            for place in range(len(tail)):
                message[at + place] = tail[place]
            at += len(tail)
            length = at - _HEAD_BYTES
            for place in range(8):
                message[_LENGTH_AT + place] = length >> 8 * place & 0xFF
            begin(state.ctypes)
            update(state.ctypes, message.ctypes, at)
            end(hashes[block].ctypes, state.ctypes)
            for place in range(_HASH_BYTES):
                message[_PARENT_AT + place] = hashes[block, place]

    compiled: Loop = numba.njit(loop)
    return compiled
