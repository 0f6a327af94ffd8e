"""From a route to the database of keys and back, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Engine

from hycluster.auth.admin_store import AdminStore
from hycluster.auth.caller import Caller, current_caller
from hycluster.errors import Unavailable
from hycluster.ledger.books import Books

logger = logging.getLogger(__name__)

# Fewer than the engine's connections: none waits for one.
THREADS = 2
# Each waits for at most a few answers of a database that is away (``ANSWER_TIMEOUT_S``).
MOST_WAITING = 64
RETRY_AFTER_S = 1.0
MAX_ACTOR = 200

T = TypeVar("T")


class Administration:
    """Asks the database for whoever calls.

    Attributes:
        books: the usage ledger; None where it is off.
        currency: of what it has as costs.
    """

    def __init__(self, engine: Engine, books: Books | None = None, currency: str = "usd") -> None:
        self.books = books
        self.currency = currency
        self._engine = engine
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="admin-api")
        self._waiting = 0

    async def ask(self, work: Callable[[AdminStore], T]) -> T:
        """What ``work`` makes of the database.

        Raises:
            Unavailable: the database is away, or too many wait for it.
        """
        if self._waiting >= MOST_WAITING:
            raise Unavailable(f"admin API: {self._waiting} requests wait for the database", retry_after_s=RETRY_AFTER_S)
        store = AdminStore(self._engine, acting(manager()))
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, store)
        except Unavailable as error:
            logger.warning("%s", error.message)
            raise Unavailable("admin API: the database of keys is away", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Blocks until what it was asked for is done."""
        self._threads.shutdown()
        self._engine.dispose()


def manager() -> Caller:
    """Whoever calls."""
    caller = current_caller.get()
    assert caller is not None, "the admin API is behind a guard"
    return caller


def acting(caller: Caller) -> str:
    """How the audit log calls him."""
    kind = "key" if caller.key_id else "token"
    return f"{kind} {caller.owner}/{caller.key}"[:MAX_ACTOR]
