"""Lets calls go side by side, or one of them alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Gate:
    """Calls of one event loop."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._turn = asyncio.Lock()
        self._inside = 0
        self._alone = 0

    async def beside_others(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call, once no call that must be alone is there or waits."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            return await call()
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def alone(self, call: Callable[[], Awaitable[T]]) -> T:
        """Let no more calls in, wait until those inside are done, call, let the others go on."""
        self._alone += 1
        self._open.clear()
        try:
            async with self._turn:
                await self._empty.wait()
                return await call()
        finally:
            self._alone -= 1
            if not self._alone:
                self._open.set()
