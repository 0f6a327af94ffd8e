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

from hycluster.engine.block_changes import NAME_BYTES, Names

HashFn = Callable[[Any], bytes]
# Tokens that are remembered as one piece, and how many tokens are in all.
CHUNK_TOKENS = 512
MEMO_TOKENS = 16 << 20
# So many tokens from the begin have names whether somebody has their blocks or not; and so many are hashed at least
# before that is asked again, which a conversation's turn seldom needs.
BEGIN_TOKENS, ASK_TOKENS = 1024, 2048


class BlockHasher:
    """Names blocks, and remembers.

    Args:
        hash_fn: vLLM's, of a parent's hash, the tokens and the extra keys.
        seed: what stands for the parent of a first block; vLLM's ``NONE_HASH``.
        block_tokens: of the engines.
        memo_tokens: of prompts, remembered at most.
    """

    def __init__(self, hash_fn: HashFn, seed: bytes, block_tokens: int, memo_tokens: int = MEMO_TOKENS) -> None:
        self._hash_fn, self._seed, self._block_tokens = hash_fn, seed, block_tokens
        self._chunk_tokens = max(1, CHUNK_TOKENS // block_tokens) * block_tokens
        self._most = max(1, memo_tokens // self._chunk_tokens)
        # By the hash before, the tokens and the extra keys: the hash of the last block, and the names of all. Longest
        # not used first.
        self._memo: dict[tuple[bytes, bytes, Any], tuple[bytes, Names]] = {}

    def names(
        self,
        token_ids: Sequence[int],
        *,
        first_keys: tuple[Any, ...] | None = None,
        keys: tuple[Any, ...] | None = None,
        there: Callable[[int], bool] | None = None,
    ) -> Names:
        """Of whole blocks, from the first.

        Args:
            first_keys, keys: the extra keys of the first block, and of all others.
            there: whether a block is of use to anyone; where one is not, those behind it are not either, and get no
                names. It is asked now and then, so some have names for
                nothing: as many as there are others, or some chunks. None: all get names.
        """
        width, whole = self._chunk_tokens, len(token_ids) // self._block_tokens * self._block_tokens
        parent, found, hashed, ask_at = self._seed, list[Names](), 0, 0
        # Packing all of it takes as long as hashing a tenth; often its begin is all that is needed.
        packed = memoryview(array("I", token_ids[: 4 * width]))
        for begin in range(0, whole, width):
            end = min(begin + width, whole)
            if end > len(packed):
                packed = memoryview(array("I", token_ids))
            piece = packed[begin:end].tobytes()
            extra = (first_keys, keys) if begin == 0 else (keys, keys)
            known = self._memo.pop((parent, piece, extra), None)
            if known is None:
                if there is not None and begin >= BEGIN_TOKENS and hashed >= ask_at:
                    if not there(int(found[-1][-1])):
                        break
                    ask_at = max(ASK_TOKENS, 2 * hashed)
                hashed += end - begin
                known = self._hash(parent, token_ids[begin:end], *extra)
            self._memo[parent, piece, extra] = known
            parent = known[0]
            found.append(known[1])
        while len(self._memo) > self._most:
            del self._memo[next(iter(self._memo))]
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def _hash(
        self, parent: bytes, tokens: Sequence[int], first_keys: tuple[Any, ...] | None, keys: tuple[Any, ...] | None
    ) -> tuple[bytes, Names]:
        hash_fn, size, last, cut = self._hash_fn, self._block_tokens, parent, list[bytes]()
        extra = first_keys
        for begin in range(0, len(tokens), size):
            last = hash_fn((last, tuple(tokens[begin : begin + size]), extra))
            cut.append(last[-NAME_BYTES:])
            extra = keys
        return last, np.frombuffer(b"".join(cut), ">u8").astype(np.uint64)
