"""Texts that may be printed: without the keys that a URI carries along."""

from __future__ import annotations

import re

# The keys in a URI, also where they hold a slash that should have been escaped.
_KEYS = re.compile(r"://(?:[^/?#@:\s]+:(?:[^/?#\s]*@|\S*@)|[^/?#@\s]*@)")


def masked(text: str) -> str:
    """A path, or a text with paths in it, as it may be printed: without the keys of ``s3://KEY:SECRET@bucket``."""
    return _KEYS.sub("://***@", text)


def masked_line(error: BaseException) -> str:
    """An error's message on one line, its type where it has none; keys in it are masked."""
    return masked(" ".join(str(error).split())[:500]) or type(error).__name__
