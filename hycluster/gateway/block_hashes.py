"""The names of a prompt's KV blocks, as the replicas' engines make them.

By vLLM's own function (``hash_fn``, of its setting ``prefix_caching_hash_algo``): a block's hash is of the hash before
it, its tokens, and what else its content depends on. Of that, the last 64 bits are kept, as in vLLM's KV events.

Hashing a long prompt takes longer than choosing a replica, and the turns of a conversation begin alike, so chunks that
were hashed before are remembered. And who only looks for blocks that are somewhere needs no names behind those.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hycluster.engine.block_changes import NAME_BYTES, Names

Keys = tuple[Any, ...] | None
HashFn = Callable[[Any], bytes]
# Of blocks, ``[blocks, bytes]``.
Hashes = NDArray[np.uint8]
# Of the hash before them, their tokens, how many are a block, and the extra keys; None: one by one, then.
HashMany = Callable[[bytes, NDArray[np.uint32], int, Keys], Hashes | None]
# Tokens that are remembered as one piece, and how many tokens are in all.
CHUNK_TOKENS = 512
MEMO_TOKENS = 16 << 20
# After so many tokens that had to be hashed it is asked whether somebody has their blocks, which a conversation's turn
# seldom needs; and again after so many times as many. By each question a thousand replicas are looked through, which
# takes as long as to hash some thousand tokens.
ASK_TOKENS, ASK_FACTOR = 2048, 4


class BlockHasher:
    """Names blocks, and remembers.

    Args:
        hash_fn: vLLM's, of a parent's hash, the tokens and the extra keys.
        seed: what stands for the parent of a first block; vLLM's ``NONE_HASH``.
        block_tokens: of the engines.
        memo_tokens: of prompts, remembered at most.
        hash_many: the same for many blocks at once.
    """

    def __init__(
        self,
        hash_fn: HashFn,
        seed: bytes,
        block_tokens: int,
        memo_tokens: int = MEMO_TOKENS,
        hash_many: HashMany | None = None,
    ) -> None:
        self._hash_fn, self._seed, self._block_tokens, self._hash_many = hash_fn, seed, block_tokens, hash_many
        self._chunk_tokens = max(1, CHUNK_TOKENS // block_tokens) * block_tokens
        self._most = max(1, memo_tokens // self._chunk_tokens)
        # By the hash before, the tokens and the extra keys: the hash of the last block, and the names of all. Longest
        # not used first.
        self._memo: dict[tuple[bytes, bytes, Any], tuple[bytes, Names]] = {}
        # Hashed and not yet remembered: the hash before, tokens, hashes, names, the extra keys.
        self._new: list[tuple[bytes, memoryview, Hashes, Names, tuple[Keys, Keys]]] = []

    def names(
        self,
        token_ids: Sequence[int],
        *,
        first_keys: Keys = None,
        keys: Keys = None,
        there: Callable[[int], bool] | None = None,
    ) -> Names:
        """Of whole blocks, from the first.

        Args:
            first_keys, keys: the extra keys of the first block, and of all others.
            there: whether a block is of use to anyone; where one is not, those behind it are not either, and get no
                names. It is asked now and then, so some have names for nothing: three times as many as there are
                others, or some chunks. None: all get names.
        """
        self.remember()
        width, whole = self._chunk_tokens, len(token_ids) // self._block_tokens * self._block_tokens
        parent, found, hashed, ask_at, begin = self._seed, list[Names](), 0, ASK_TOKENS, 0
        # Packing all of it takes half as long as hashing it; often its begin is all that is needed.
        packed = memoryview(array("I", token_ids[: max(width, 2 * ASK_TOKENS)]))
        while begin < whole:
            if begin + width > len(packed) < whole:
                packed = memoryview(array("I", token_ids))
            piece, extra = packed[begin : min(begin + width, whole)].tobytes(), (keys if begin else first_keys, keys)
            if (known := self._memo.pop((parent, piece, extra), None)) is not None:
                self._memo[parent, piece, extra] = known
                parent, names = known
                found.append(names)
                begin += width
                continue
            end = whole
            if there is not None:
                if hashed >= ask_at:
                    if not there(int(found[-1][-1])):
                        break
                    ask_at = ASK_FACTOR * hashed
                # Whole chunks.
                end = min(whole, begin - (hashed - ask_at) // width * width)
            if end > len(packed):
                packed = memoryview(array("I", token_ids))
            hashes, names = self._hash(parent, packed[begin:end], *extra)
            self._new.append((parent, packed[begin:end], hashes, names, extra))
            parent = hashes[-1].tobytes()
            found.append(names)
            hashed += end - begin
            begin = end
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def remember(self) -> None:
        """What was hashed by the last call; the next one would do it, and has no time for that."""
        size, width = self._block_tokens, self._chunk_tokens
        for parent, tokens, hashes, names, extra in self._new:
            before, keys = parent, extra
            for begin in range(0, len(tokens), width):
                end = min(begin + width, len(tokens))
                last = hashes[end // size - 1].tobytes()
                # A copy, since a view would keep all of it when most is forgotten.
                known = last, names[begin // size : end // size].copy()
                self._memo[before, tokens[begin:end].tobytes(), keys] = known
                before, keys = last, (extra[1], extra[1])
        self._new.clear()
        while len(self._memo) > self._most:
            del self._memo[next(iter(self._memo))]

    def _hash(self, parent: bytes, tokens: memoryview, first_keys: Keys, keys: Keys) -> tuple[Hashes, Names]:
        size = self._block_tokens
        if first_keys == keys:
            hashes = self._hash_blocks(parent, tokens, keys)
        else:
            hashes = self._hash_blocks(parent, tokens[:size], first_keys)
            if len(tokens) > size:
                more = self._hash_blocks(hashes[0].tobytes(), tokens[size:], keys)
                hashes = np.concatenate((hashes, more))
        return hashes, np.ascontiguousarray(hashes[:, -NAME_BYTES:]).view(">u8")[:, 0].astype(np.uint64)

    def _hash_blocks(self, parent: bytes, tokens: memoryview, keys: Keys) -> Hashes:
        if self._hash_many is not None:
            made = self._hash_many(parent, np.frombuffer(tokens, np.uint32), self._block_tokens, keys)
            if made is not None:
                return made
        hash_fn, size, last, hashes = self._hash_fn, self._block_tokens, parent, list[bytes]()
        for begin in range(0, len(tokens), size):
            last = hash_fn((last, tuple(tokens[begin : begin + size].tolist()), keys))
            hashes.append(last)
        return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), len(last))
