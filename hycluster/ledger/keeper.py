"""The ledger in a process that answers requests: its file, and the thread that syncs, cuts and commits.

The thread commits the files of others too that have left them, on this machine: those of processes that were killed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Protocol

from hycluster.errors import SettingsError
from hycluster.ledger.account import account_book
from hycluster.ledger.books import Books, books_of
from hycluster.ledger.entry import Entry, as_table, entries_in
from hycluster.ledger.journal import UsageJournal, files_in, taken
from hycluster.ledger.tally import ProjectTally
from hycluster.settings.base import home, private_home
from hycluster.settings.ledger import Ledger
from hycluster.settings.model import Model
from hycluster.settings.price import Price, cost_of
from hycluster.settings.settings import Settings

logger = logging.getLogger(__name__)

TICK_S = 1.0
TIDY_EVERY_S = 600.0
MIB = 1 << 20


class LedgerFigures(Protocol):
    """What is shown of a process's ledger.

    Attributes:
        entries: lines that it has written.
        lost: lines that it could not write at all.
        tally: what is in them, by project.
    """

    entries: int
    tally: ProjectTally

    @property
    def lost(self) -> int: ...

    def lag_s(self) -> float:
        """Age of the oldest line of this machine that is not committed; 0 if all are."""


class Keeper:
    """Of one process; ``start`` it, and ``close`` it when nothing is answered any more.

    Raises:
        OSError: nothing can be written in the journals' folder.
    """

    def __init__(self, books: Books, settings: Ledger) -> None:
        assert books.journals is not None
        self._books = books
        self._folder: Path = books.journals
        self._settings = settings
        self._journal = UsageJournal(self._folder)
        self.entries = 0
        self.tally = ProjectTally()
        self._left_since: float | None = None
        self._tidied_s = self._synced_s = time.monotonic()
        self._said_away = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)

    def start(self) -> None:
        # pyarrow looks for pandas at the first table that it makes, and imports it: a quarter of a second, which no
        # stream is to wait for.
        as_table(())
        self._thread.start()

    def write(self, entry: Entry) -> None:
        self.entries += 1
        self.tally.count(entry)
        self._journal.append(entry.line())

    @property
    def lost(self) -> int:
        return self._journal.lost

    def lag_s(self) -> float:
        times = [since for since in (self._journal.since, self._left_since) if since is not None]
        return max(0.0, time.time() - min(times)) if times else 0.0

    def close(self) -> None:
        """Write what is left, and commit it if the store is there."""
        self._closing.set()
        self._thread.join()
        self._journal.close()
        self._commit()

    def commit(self) -> None:
        """Commit what was written until now, here and by processes of this machine that have ended."""
        self._journal.cut()
        self._commit()

    def _run(self) -> None:
        while not self._closing.wait(min(TICK_S, self._settings.cut_every_s / 2)):
            try:
                self._look()
            except Exception:
                logger.exception("ledger: can't be kept; trying again")

    def _look(self) -> None:
        settings, now_s = self._settings, time.monotonic()
        self._journal.retry()
        if settings.sync_every_s is not None and now_s - self._synced_s >= settings.sync_every_s:
            self._synced_s = now_s
            self._journal.sync()
        since = self._journal.since
        due = since is not None and time.time() - since >= settings.cut_every_s
        if self._journal.size_bytes and (due or self._journal.size_bytes >= settings.cut_mib * MIB):
            self._journal.cut()
        self._commit()
        if now_s - self._tidied_s >= TIDY_EVERY_S:
            self._tidied_s = now_s
            self._books.tidy()

    def _commit(self) -> None:
        """Never raises where the store is away: what is not committed stays, and is told of by its age."""
        left: list[float] = []
        for file in files_in(self._folder):
            with taken(file) as data:
                if data is None:
                    continue
                entries: list[Entry] = []
                try:
                    entries.extend(entries_in(data))
                    self._books.commit(file.stem, entries)
                except Exception as error:
                    if not self._said_away:
                        logger.warning("ledger: %s can't be committed; trying again: %s", file, error, exc_info=True)
                    self._said_away = True
                    left.append(min((entry.ended_at for entry in entries), default=file.stat().st_mtime))
                    continue
                file.unlink()
                self._said_away = False
        self._left_since = min(left, default=None)


@asynccontextmanager
async def open_ledger(settings: Settings) -> AsyncIterator[Keeper | None]:
    """The ledger of this process, for as long as it answers; None where it is off.

    Raises:
        SettingsError: its store, or the home of this machine, can't be used. A store that is away now can.
    """
    books = books_of(settings)
    if books is None:
        yield None
        return
    keeper = await asyncio.to_thread(_begun, books, settings.ledger)
    keeper.start()
    account_book.cost_of = PriceList(settings.models)
    account_book.write_entry = keeper.write
    try:
        yield keeper
    finally:
        account_book.write_entry = None
        await asyncio.to_thread(keeper.close)


def _begun(books: Books, settings: Ledger) -> Keeper:
    with suppress(OSError):
        books.folder.check_creates_once(".check")
    try:
        private_home()
        return Keeper(books, settings)
    except OSError as error:
        raise SettingsError(f"ledger: can't be kept below HYCLUSTER_HOME ({home()}): {error}") from None


class PriceList:
    """What tokens cost, by the name of the model or of one of its adapters."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self._prices: dict[str, Price | None] = {name: model.price for model in models for name in model.names}

    def __call__(self, model: str, input_tokens: int, cached_tokens: int, output_tokens: int) -> Decimal:
        return cost_of(self._prices.get(model), input_tokens, cached_tokens, output_tokens)
