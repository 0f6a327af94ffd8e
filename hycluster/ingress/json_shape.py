"""How much there is in a JSON body, told while it comes and before anybody takes it apart.

What it costs to read and validate goes by its objects and their members, not by its bytes.
"""

from __future__ import annotations

import re

# A string, to its end or as much of it as has come. What is taken is not given back.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# No JSON has it, but in strings.
_OUTSIDE = b"\x01"


# To tell what is within strings takes a second for ten megabytes.
MOST_LOOKED_AT = 1 << 20


class JsonShape:
    """
    Attributes:
        members: objects, arrays and members of objects so far.
    """

    def __init__(self) -> None:
        self.members = 0
        # What the next piece is read behind: the string that it begins in.
        self._before = b""

    def feed(self, piece: bytes) -> None:
        """Count on; what is within strings is text."""
        text = self._before + piece
        outside = _STRING.sub(b"", text + _OUTSIDE)
        self._before = b""
        if b"\0" in piece:
            # UTF-16: what looks like a quote is half of a character, maybe.
            outside = piece
        elif not outside.endswith(_OUTSIDE):
            backslashes = len(text) - len(text.rstrip(b"\\"))
            self._before = b'"\\' if backslashes % 2 else b'"'
        self.members += outside.count(b"{") + outside.count(b"[") + outside.count(b":")


def members_of_text(text: bytes, most: int) -> int:
    """Of JSON that is whole, and read as such where it is text in a request; too many if it is both large and full of
    what would be members, were it not within strings.

    Args:
        most: up to so many it makes no difference how many there are.
    """
    members = sum(map(text.count, (b"{", b"[", b":")))
    if members <= most or len(text) > MOST_LOOKED_AT:
        return members
    shape = JsonShape()
    shape.feed(text)
    return shape.members
