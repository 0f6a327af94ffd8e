"""The names of a request's KV blocks, as its engine is going to have them: by vLLM's own hash.

Pinned to vLLM 0.32.0, into whose internals it reaches; ``tests/gateway/test_block_names.py`` compares with what its
``Request`` makes. A block's hash is made of the one before it, its tokens and its extra keys: the LoRA adapter's name
and path, the caller's ``cache_salt`` (first block), ids of media in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from hycluster.engine.block_changes import NAME_BYTES, Names
from hycluster.engine.patches.pinned import pinned_to
from hycluster.engine.protocol import BlockNaming
from hycluster.gateway.block_hashes import BlockHasher, HashMany
from hycluster.gateway.sha256_blocks import compiled_loop, sha256_hashes

pinned_to("vllm", "0.32.0", __name__)


# Up to so many tokens of a prompt vLLM's function names within a millisecond.
SHORT_TOKENS = 8192


class BlockNamer:
    """Names blocks of requests, all of one naming at a time.

    Args:
        longest_prompt_tokens: that the model takes; where it is short, nothing is compiled. None: not known.
    """

    def __init__(self, longest_prompt_tokens: int | None = None) -> None:
        self._naming: BlockNaming | None = None
        self._hasher: BlockHasher | None = None
        self._many: HashMany | None = None
        # Takes a second and 130 MiB; and no request is to wait for it, so it is done before there are any.
        if (longest_prompt_tokens is None or longest_prompt_tokens > SHORT_TOKENS) and compiled_loop():
            self._many = sha256_hashes

    def names(
        self,
        request: EngineCoreRequest,
        naming: BlockNaming,
        output: Sequence[int] = (),
        there: Callable[[int], bool] | None = None,
    ) -> Names:
        """Names of the full blocks of a request's tokens, from the first.

        Args:
            output: tokens that it has got so far.
            there: whether anyone has a block; names may end where that is so of none. None: all get names.

        Returns:
            None of them where there is no telling: for prompts that are embeddings.
        """
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            return np.empty(0, np.uint64)
        tokens = [*request.prompt_token_ids, *output] if output else request.prompt_token_ids
        if len(tokens) < naming.tokens:
            return np.empty(0, np.uint64)
        if request.mm_features:
            return _named_with_media(request, tokens, naming)
        if self._hasher is None or naming != self._naming:
            hash_fn = get_hash_fn_by_name(naming.algorithm)
            many = self._many if naming.algorithm == "sha256" else None
            self._naming, self._hasher = naming, BlockHasher(hash_fn, naming.root, naming.tokens, hash_many=many)
        # It reads four attributes, which both have.
        asked, size = cast("Request", request), naming.tokens
        first_keys, keys = (
            generate_block_hash_extra_keys(asked, begin, begin + size, 0)[0] for begin in (0, naming.tokens)
        )
        return self._hasher.names(tokens, first_keys=first_keys, keys=keys, there=there)

    def remember(self) -> None:
        """The names that were given last; when nobody waits."""
        if self._hasher is not None:
            self._hasher.remember()


def _named_with_media(request: EngineCoreRequest, tokens: Sequence[int], naming: BlockNaming) -> Names:
    """Each block may have keys of its own."""
    hashed, asked = get_hash_fn_by_name(naming.algorithm), cast("Request", request)
    last, size, names, medium = BlockHash(naming.root), naming.tokens, list[int](), 0
    for begin in range(0, len(tokens) - size + 1, size):
        keys, medium = generate_block_hash_extra_keys(asked, begin, begin + size, medium)
        last = BlockHash(hashed((last, tuple(tokens[begin : begin + size]), keys)))
        names.append(int.from_bytes(last[-NAME_BYTES:], "big"))
    return np.array(names, np.uint64)


def reads_cache(request: EngineCoreRequest) -> bool:
    """Whether its engine looks for its blocks; not where each token of the prompt is to be computed."""
    params = request.sampling_params or request.pooling_params
    return params is not None and not params.skip_reading_prefix_cache
