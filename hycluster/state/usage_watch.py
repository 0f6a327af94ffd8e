"""Where an ingress process has usage from, for whoever looks at it: read in a thread, and while somebody looks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from hycluster.ledger.books import Books
from hycluster.ledger.recent import RecentUsage
from hycluster.limits.book import Name
from hycluster.state.usage_state import DAY_S, HOUR_S, MOST, UsageState, limits_usage, periods, span_usage

if TYPE_CHECKING:
    from hycluster.auth.keyring import Keyring

logger = logging.getLogger(__name__)

READ_EVERY_S = 5.0
# What is read in a thread holds up the event loop's own: at most a fiftieth of its time.
SPARED = 50
WAITS_S = 1.0
ANSWER_WITHIN_S = 3.0


class UsageWatch:
    """Args:
    books: the usage ledger.
    keyring: which knows the limits; None where there are none.
    used: asks the directory what is used of limits now.
    currency: of costs and budgets.
    """

    def __init__(
        self,
        books: Books,
        keyring: Keyring | None,
        used: Callable[[], Awaitable[Mapping[Name, int]]],
        currency: str,
    ) -> None:
        self._recent = RecentUsage(books)
        self._keyring = keyring
        self._used = used
        self._last = UsageState(0, currency)
        self._reading: asyncio.Task[None] | None = None
        self._next_s = float("-inf")

    async def now(self) -> UsageState:
        """What was read last, mostly some seconds ago. Waits for the store for a moment only."""
        reading = self._reading is not None and not self._reading.done()
        if not reading and time.monotonic() >= self._next_s:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=WAITS_S)
        return self._last

    async def _read(self) -> None:
        began_s, now = time.monotonic(), time.time()
        problems = []
        spans, limits = self._last.spans, self._last.limits
        try:
            sums = await asyncio.to_thread(self._recent.by_project, (HOUR_S, DAY_S), now)
            spans = tuple(span_usage(span_s, each) for span_s, each in zip((HOUR_S, DAY_S), sums, strict=True))
        except Exception as error:
            # What is wrong with one file, say, is said where it is looked at, and tried again.
            logger.warning("the usage ledger can't be read", exc_info=error)
            problems.append(f"the usage ledger can't be read: {type(error).__name__}")
        self._next_s = time.monotonic() + max(READ_EVERY_S, SPARED * (time.monotonic() - began_s))
        left_out = self._last.limits_left_out
        if self._keyring is not None:
            try:
                told = limits_usage(
                    self._keyring.limits,
                    await self._used_now(),
                    await asyncio.to_thread(self._keyring.store.spent, sorted({*periods(now).values()})),
                    self._keyring.key_name,
                    now,
                )
                limits, left_out = tuple(told[:MOST]), max(0, len(told) - MOST)
            except Exception as error:
                logger.warning("how near limits are can't be read", exc_info=error)
                problems.append(f"how near limits are can't be read: {type(error).__name__}")
        self._last = dataclasses.replace(
            self._last, at=now, spans=spans, limits=limits, limits_left_out=left_out, problems=tuple(problems)
        )

    async def _used_now(self) -> Mapping[Name, int]:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            return await self._used()

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
