"""Waiting for what other tasks, threads and processes do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

# How long a test waits for what takes a moment. Reached only where it never comes, so a busy machine is no matter; what
# has to be quick is told by what it must not wait for, which takes longer than this.
PATIENCE_S = 30.0


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S, every_s: float = 0.005) -> None:
    """Wait for what other tasks of this loop do, and what tells nobody."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(every_s)


def eventually(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait for what other threads do."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
