"""Server-sent events as they come.

Not by ``httpx.Response.aiter_lines``: that also ends a line at U+0085, U+2028 and the like, which JSON may hold as they
are, and which models write.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx


async def event_lines(answer: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream of events, without their ends."""
    rest = b""
    async for chunk in answer.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()
    if rest:
        yield rest.decode()
