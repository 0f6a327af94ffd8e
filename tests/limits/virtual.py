"""Processes with limiters and the directory's book, on one virtual clock: minutes pass in seconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar
from unittest import mock

from hycluster.auth.caller import Caller
from hycluster.auth.limits import Limit
from hycluster.auth.store import Spent
from hycluster.limits.book import LeaseAnswer, LeaseAsk, LeaseBook, Name
from hycluster.limits.limiter import Limiter

T = TypeVar("T")
ME = Caller("acme", "search", "laptop", key_id="key_1")
START_S = 1000.0


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: time jumps."""

    now_s = START_S

    def select(self, timeout: float | None = None) -> Any:
        self.now_s += timeout or 0.0
        return super().select(0)


async def _at_once(work: Callable[..., T], *given: Any) -> T:
    """In a thread's place, which would take real time while ours jumps."""
    return work(*given)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop whose time is virtual."""
    selector = _Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    try:
        with mock.patch("asyncio.to_thread", _at_once):
            return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


class Away(Exception):
    """The directory is."""


class Counts:
    """In the database's place."""

    def __init__(self) -> None:
        self.all: dict[Spent, int] = {}

    def spend(self, spent: Mapping[Spent, int]) -> None:
        for which, amount in spent.items():
            self.all[which] = self.all.get(which, 0) + amount

    def spent(self, periods: Iterable[str]) -> dict[Spent, int]:
        return {which: amount for which, amount in self.all.items() if which[2] in set(periods)}


class World:
    """Attributes: limits: of all processes. book: None while the directory is away. calls: to it."""

    def __init__(self, *limits: Limit) -> None:
        self.limits = limits
        self.counts = Counts()
        self.calls = 0
        self.book: LeaseBook | None = None
        self.start_directory(ago_s=60)

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def start_directory(self, ago_s: float = 0.0) -> None:
        """With an empty book."""
        self.book = LeaseBook(self.now_s)
        self.book._began_s -= ago_s

    def process(self) -> Process:
        return Process(self)

    async def lease(self, who: str, book: str, asks: dict[Name, LeaseAsk]) -> LeaseAnswer:
        self.calls += 1
        await asyncio.sleep(0.002)
        if self.book is None:
            raise Away
        return self.book.lease(who, book, asks)


class Process:
    """One process that callers come to."""

    def __init__(self, world: World) -> None:
        self.limiter = Limiter(lambda: world.limits, world.lease, world.counts, clock=world.now_s, date=lambda: 1.8e9)
        self._tasks = [asyncio.create_task(self.limiter.follow()), asyncio.create_task(self.limiter.keep_counts())]

    def kill(self) -> None:
        for task in self._tasks:
            task.cancel()
