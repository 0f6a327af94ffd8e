"""Ends answers that run when those who asked for them would not be let in any more (``auth.end_streams``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Container
from typing import Protocol

from hycluster.auth.caller import Caller
from hycluster.auth.guard import Guard
from hycluster.errors import HyclusterError, Unauthenticated

logger = logging.getLogger(__name__)

# With as much until a change is known (``auth.poll_s``), within the two seconds that are promised.
LOOK_EVERY_S = 0.5


class Running(Protocol):
    """What is in flight behind both ingresses."""

    @property
    def callers(self) -> set[Caller]:
        """For whom."""

    async def end(self, error: HyclusterError, of: Container[Caller]) -> None:
        """End it, for these callers."""


@contextlib.asynccontextmanager
async def ending(running: Running, guard: Guard | None) -> AsyncIterator[None]:
    """Within it, what runs for callers that have ended is ended; None: it goes on."""
    if guard is None:
        yield
        return
    task = asyncio.create_task(_keep_ending(running, guard))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _keep_ending(running: Running, guard: Guard) -> None:
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        try:
            if ended := {caller for caller in running.callers if guard.has_ended(caller)}:
                error = Unauthenticated("API key: was revoked or has expired before the answer was complete")
                await running.end(error, ended)
        except Exception:
            # Or no answer would ever be ended again.
            logger.exception("answers of callers that have ended can't be ended; trying again")
