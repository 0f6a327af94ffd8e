"""A gateway's hashes of many blocks at once are those of vLLM's ``sha256``, to the last byte."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("vllm_imported")

LARGEST = (1 << 31) - 1
KEYS: dict[str, Any] = {
    "none": None,
    "salt": (("cache_salt", "pepper"),),
    "adapter": (("lora", "a", "/adapters/a"),),
    "both": (("lora", "名", "/adapters/名"), ("cache_salt", "x" * 300)),
}


def of_vllm(parent: bytes, tokens: Sequence[int], size: int, keys: Any) -> bytes:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import BlockHash, hash_block_tokens

    hashes, last = [], BlockHash(parent)
    for begin in range(0, len(tokens) - size + 1, size):
        last = hash_block_tokens(sha256, last, tokens[begin : begin + size], keys)
        hashes.append(last)
    return b"".join(hashes)


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("size", [4, 16, 128, 2048])
def test_they_are_vllms(size: int, keys: Any) -> None:
    from hycluster.gateway.sha256_blocks import sha256_hashes

    chance = random.Random(size)
    for _ in range(20):
        parent, top = chance.randbytes(32), chance.choice([256, 65_536, 128_000, LARGEST + 1])
        tokens = [chance.randrange(top) for _ in range(size * chance.randrange(1, 6) + chance.randrange(size))]
        # Where pickle goes over to more bytes.
        tokens[: chance.randrange(7)] = chance.sample([0, 255, 256, 65_535, 65_536, LARGEST], chance.randrange(1, 7))
        made = sha256_hashes(parent, np.array(tokens, np.uint32), size, keys)
        if len(tokens) >= size:
            assert made is not None
            assert made.tobytes() == of_vllm(parent, tokens, size, keys)


def test_what_pickle_writes_otherwise_is_left_to_vllms_function() -> None:
    from hycluster.gateway.sha256_blocks import sha256_hashes

    parent, tokens = bytes(32), np.arange(64, dtype=np.uint32)
    assert sha256_hashes(parent, tokens, 16, None) is not None
    assert sha256_hashes(parent, tokens + np.uint32(LARGEST), 16, None) is None
    assert sha256_hashes(parent, tokens, 3, None) is None
    assert sha256_hashes(b"short", tokens, 16, None) is None
    assert sha256_hashes(parent, tokens, 16, (("cache_salt", "x" * 70_000),)) is None


@pytest.mark.parametrize("salt", [None, "pepper", "x" * 70_000])
def test_names_are_the_same_with_and_without(salt: str | None) -> None:
    """Of prompts that begin alike, ask where blocks are, and hold tokens that are as large as can be."""
    from vllm.utils.hashing import sha256

    from hycluster.gateway.block_hashes import BlockHasher
    from hycluster.gateway.sha256_blocks import sha256_hashes

    chance, seed = random.Random(3), bytes(range(32))
    long = [chance.randrange(128_000) for _ in range(9000)]
    first = None if salt is None else (("cache_salt", salt),)
    many, one = BlockHasher(sha256, seed, 16, 6000, hash_many=sha256_hashes), BlockHasher(sha256, seed, 16)
    for number in range(40):
        prompt = long[: chance.randrange(9000)] + [number] * chance.randrange(1500)
        if number % 5 == 0:
            prompt.insert(chance.randrange(len(prompt) + 1), (1 << 32) - 1)
        whole = one.names(prompt, first_keys=first)
        held = set(whole[: chance.randrange(600)].tolist())
        some = many.names(prompt, first_keys=first, there=held.__contains__)
        assert some.tolist() == whole[: len(some)].tolist()
        assert len(some) >= min(len(held), len(whole))
        assert many.names(prompt, first_keys=first).tolist() == whole.tolist()
