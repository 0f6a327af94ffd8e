from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from hycluster.auth.api_key import ALPHABET, PREFIX, RANDOM, digest, is_whole, new_key


def test_a_key_is_whole_and_like_no_other() -> None:
    keys = {new_key() for _ in range(1000)}
    assert len(keys) == 1000
    assert all(is_whole(key) and key.startswith(PREFIX) for key in keys)
    assert len(ALPHABET) ** RANDOM > 2**256


def test_none_that_is_cut_or_mistyped_is() -> None:
    key = new_key()
    assert not any(is_whole(key[:size]) for size in range(len(key)))
    assert not any(is_whole(key[:at] + ("x" if key[at] != "x" else "y") + key[at + 1 :]) for at in range(len(key)))
    assert not is_whole(f"{key}\n")
    assert not is_whole(key.replace(PREFIX, "sk-"))


@given(st.text())
def test_whatever_it_is_it_has_a_digest(text: str) -> None:
    assert not is_whole(text)
    assert len(digest(text)) == 32
    assert digest("a") == hashlib.sha256(b"a").digest()
