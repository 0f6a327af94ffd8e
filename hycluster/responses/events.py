"""Server-sent events of a response: out of vLLM's stream and into our callers'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class EventReader:
    """Takes a stream apart as it comes."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, chunk: bytes) -> Iterator[bytes]:
        """Each whole event of what has come by now, as it was."""
        *whole, self._rest = (self._rest + chunk).split(b"\n\n")
        for raw in whole:
            yield raw + b"\n\n"

    def left(self) -> bytes:
        """What came behind the last whole one."""
        rest, self._rest = self._rest, b""
        return rest


def event_of(raw: bytes) -> dict[str, Any] | None:
    """An event's data; None if it is no object."""
    lines = [line[5:] for line in raw.split(b"\n") if line.startswith(b"data:")]
    try:
        data = json.loads(b"\n".join(lines))
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def as_sse(event: dict[str, Any]) -> bytes:
    """An event as OpenAI's API streams it."""
    return f"event: {event.get('type', 'unknown')}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
