"""API keys: ``hyc_``, 43 random letters and digits (256 bits), and 6 that are a checksum of all before.

The checksum tells a key that was cut or mistyped, and what only looks like a key, from one that is not known, without
the database. It is no secret, and no protection: what lets in is the whole key's SHA-256, which is all that is stored.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib

PREFIX = "hyc_"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
RANDOM, CHECKED = 43, 6
_KEY = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{RANDOM + CHECKED}}}", re.ASCII)


def new_key() -> str:
    """A key that nobody has yet."""
    body = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM))
    return body + _checksum(body)


def is_whole(text: str) -> bool:
    """Whether it has the form of a key, to the last letter."""
    return _KEY.fullmatch(text) is not None and text[-CHECKED:] == _checksum(text[:-CHECKED])


def digest(text: str) -> bytes:
    """What is stored and looked up in a key's place: 32 bytes. What is no key has one too, and it takes as long."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _checksum(body: str) -> str:
    number, letters = zlib.crc32(body.encode()), ""
    for _ in range(CHECKED):
        number, place = divmod(number, len(ALPHABET))
        letters = ALPHABET[place] + letters
    return letters
