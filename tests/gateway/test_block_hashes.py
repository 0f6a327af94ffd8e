from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.gateway.block_hashes import ASK_FACTOR, ASK_TOKENS, CHUNK_TOKENS, BlockHasher

SEED = bytes(32)


class Counted:
    """A hash that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, given_parts: Any) -> bytes:
        self.calls += 1
        return hashlib.sha256(repr(given_parts).encode()).digest()


def tokens(count: int, begin: int = 0) -> list[int]:
    return list(range(begin, begin + count))


@given(one=st.lists(st.integers(0, 3), max_size=70), other=st.lists(st.integers(0, 3), max_size=70))
def test_names_are_alike_as_far_as_the_prompts_are(one: list[int], other: list[int]) -> None:
    hasher = BlockHasher(Counted(), SEED, 4)
    alike = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    first, second = hasher.names(one), hasher.names(other)
    assert (len(first), len(second)) == (len(one) // 4, len(other) // 4)
    common = min(len(first), len(second))
    assert (first[:common] == second[:common]).sum() == alike // 4


def test_what_was_hashed_before_is_not_hashed_again() -> None:
    counted = Counted()
    hasher = BlockHasher(counted, SEED, 16)
    first = hasher.names(tokens(4 * CHUNK_TOKENS))
    calls = counted.calls
    again = hasher.names(tokens(4 * CHUNK_TOKENS) + [1] * 40)
    assert counted.calls - calls == 2
    np.testing.assert_array_equal(again[: len(first)], first)


def test_what_is_remembered_is_bounded() -> None:
    counted = Counted()
    hasher = BlockHasher(counted, SEED, 16, memo_tokens=4 * CHUNK_TOKENS)
    for begin in range(10):
        hasher.names(tokens(CHUNK_TOKENS, 1000 * begin))
    calls = counted.calls
    hasher.names(tokens(CHUNK_TOKENS, 9000))
    assert counted.calls == calls
    hasher.names(tokens(CHUNK_TOKENS, 0))
    assert counted.calls > calls


@pytest.mark.parametrize("there", [0, 1024, 3000, 20_000])
def test_behind_what_is_nowhere_nothing_is_hashed(there: int) -> None:
    counted, prompt, asked = Counted(), tokens(32_000), list[int]()
    whole = BlockHasher(Counted(), SEED, 16).names(prompt)
    somewhere = set(whole[: there // 16].tolist())

    def is_there(name: int) -> bool:
        asked.append(name)
        return name in somewhere

    hasher = BlockHasher(counted, SEED, 16)
    names = hasher.names(prompt, there=is_there)
    np.testing.assert_array_equal(names, whole[: len(names)])
    # All that is there, the begin, and at most some times as much.
    assert max(there, ASK_TOKENS) // 16 <= len(names) <= max(ASK_FACTOR * there + CHUNK_TOKENS, ASK_TOKENS) // 16
    assert counted.calls == len(names)
    assert len(asked) <= 3
    np.testing.assert_array_equal(hasher.names(prompt), whole)
    assert counted.calls == len(whole), "what was hashed is not hashed again"
    # What is remembered costs no question.
    asked.clear()
    np.testing.assert_array_equal(hasher.names(prompt, there=is_there), whole)
    assert not asked


def test_extra_keys_make_other_names() -> None:
    hasher = BlockHasher(Counted(), SEED, 16)
    prompt = tokens(2 * CHUNK_TOKENS)
    plain, salted, adapted = (
        hasher.names(prompt, first_keys=first, keys=keys)
        for first, keys in ((None, None), (("salt",), None), (("a",), ("a",)))
    )
    assert not set(plain) & set(salted) | set(plain) & set(adapted) | set(salted) & set(adapted)


@pytest.mark.usefixtures("vllm_imported")
@pytest.mark.parametrize("block_tokens", [16, 128])
@pytest.mark.parametrize("salt", [None, "pepper"])
def test_they_are_vllms_own(block_tokens: int, salt: str | None) -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    kv_cache_utils.init_none_hash(sha256)
    prompt = tokens(1300)
    request = Request(
        request_id="r",
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=kv_cache_utils.get_request_block_hasher(block_tokens, sha256),
    )
    keys, _ = kv_cache_utils.generate_block_hash_extra_keys(request, 0, block_tokens, 0)
    hasher = BlockHasher(sha256, kv_cache_utils.NONE_HASH, block_tokens)
    theirs = [kv_cache_utils.maybe_convert_block_hash(each) for each in request.block_hashes]
    assert hasher.names(prompt, first_keys=keys).tolist() == theirs
