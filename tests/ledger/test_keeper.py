"""A process's ledger: what it cuts, what it takes over, and what it does while the store is away."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hycluster.auth.caller import Caller, calling
from hycluster.errors import SettingsError
from hycluster.ledger.account import AccountBook, account_book, account_now
from hycluster.ledger.books import Books
from hycluster.ledger.entry import Entry
from hycluster.ledger.journal import UsageJournal, files_in
from hycluster.ledger.keeper import Keeper, open_ledger
from hycluster.ledger.usage import sum_usage
from hycluster.observe.ledger import LedgerMetrics
from hycluster.settings.auth import Auth
from hycluster.settings.ledger import Ledger
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.storage import locate
from tests.ledger.entries import MARCH, entry
from tests.ledger.test_journal import WRITER
from tests.waiting import eventually


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(locate(str(tmp_path / "ledger"), "ledger.store").writable(), tmp_path / "open")


def committed(books: Books) -> int:
    return sum(each.requests for each in sum_usage(Books(books.folder)))


@contextlib.contextmanager
def kept(books: Books, **settings: Any) -> Iterator[Keeper]:
    keeper = Keeper(books, Ledger(**settings))
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.close()


def test_what_is_written_is_committed_in_time_and_at_the_end(books: Books) -> None:
    with kept(books, cut_every_s=0.1) as keeper:
        keeper.write(entry())
        eventually(lambda: committed(books) == 1)
        keeper.write(entry())
        eventually(lambda: committed(books) == 2)
        assert keeper.lag_s() == 0.0
    with kept(books, cut_every_s=3600) as keeper:
        keeper.write(entry())
        assert committed(books) == 2
        assert keeper.lag_s() > 0.0
        assert sum_usage(books)[0].requests == 3
    assert committed(books) == 3
    assert books.journals is not None
    assert files_in(books.journals) == []


def test_the_next_start_takes_over_what_a_killed_process_left(books: Books) -> None:
    assert books.journals is not None
    command = [sys.executable, "-c", WRITER, str(books.journals)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        with kept(books, cut_every_s=3600):
            time.sleep(0)
            assert committed(books) == 0
        # It lives, so it has its file.
        assert len(files_in(books.journals)) == 1
        writer.kill()
        writer.wait()
    (file,) = files_in(books.journals)
    with file.open("ab") as torn:
        torn.write(entry().line()[:40])
    with kept(books, cut_every_s=3600):
        eventually(lambda: committed(books) == 100)
    assert files_in(books.journals) == []


def test_while_the_store_is_away_it_waits_and_tells(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Books.commit

    def away(*_: Any) -> None:
        raise OSError("away")

    monkeypatch.setattr(Books, "commit", away)
    metrics = LedgerMetrics()
    with kept(books, cut_every_s=0.1) as keeper:
        metrics.watch("", keeper)
        keeper.write(entry())
        eventually(lambda: keeper.lag_s() > 1e6)
        families = {family.name: family for family in metrics.collect()}
        (lag,) = families["hycluster_ledger_lag_seconds"].samples
        assert lag.value == pytest.approx(time.time() - MARCH, abs=60)
        monkeypatch.setattr(Books, "commit", commit)
        eventually(lambda: committed(books) == 1)
        eventually(lambda: keeper.lag_s() == 0.0)


def test_a_piece_that_only_another_version_can_read_stays(books: Books) -> None:
    assert books.journals is not None
    journal = UsageJournal(books.journals)
    journal.append(b'{"cost":"0","new":1}\n')
    journal.close()
    with kept(books, cut_every_s=0.1):
        pass
    assert len(files_in(books.journals)) == 1


class Book(AccountBook):
    """Attributes: found: what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Entry] = []
        self.write_entry = self.found.append

    @property
    def lines(self) -> list[tuple[str, int, int]]:
        return [(each.outcome, each.requests, each.output_tokens) for each in self.found]


def test_a_line_is_written_before_anything_more_is_sent() -> None:
    book = Book()
    with calling(Caller("acme", "search", "ci", key_id="key_1")), book.account("r", "POST /v1/responses") as account:
        assert account is not None
        assert account is account_now.get()
        account.settle()
        account.admit("m")
        account.begin("adapter", bulk=False)
        account.output_tokens = 3
        account.settle()
        assert book.lines == []
        account.end()
        for _ in range(2):
            account.settle()
        assert book.lines == [("finished", 1, 3)]
        # It asks once more, as with a tool.
        account.begin("adapter", bulk=False)
        account.output_tokens = 5
        account.end()
        account.settle()
    assert book.lines == [("finished", 1, 3), ("finished", 0, 2)]
    assert account_now.get() is None
    first = book.found[0]
    assert (first.tenant, first.project, first.key, first.key_name, first.model) == (
        "acme", "search", "key_1", "ci", "adapter",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("admitted", "begun", "raised", "outcome"),
    [
        (False, False, ValueError, None),
        (True, False, ValueError, "refused"),
        (True, True, ValueError, "failed"),
        (True, True, GeneratorExit, "cancelled"),
        (True, True, None, "finished"),
    ],
)
def test_how_it_ended(admitted: bool, begun: bool, raised: type[BaseException] | None, outcome: str | None) -> None:
    book = Book()
    with contextlib.suppress(*([raised] if raised is not None else [])), book.account("r", "grpc Generate") as account:
        assert account is not None
        if admitted:
            account.admit("m")
        if begun:
            account.begin("m", bulk=True)
        if raised is not None:
            raise raised
    assert book.lines == ([] if outcome is None else [(outcome, 1, 0)])


def test_nothing_is_counted_where_there_is_no_ledger() -> None:
    with AccountBook().account("r", "grpc Generate") as account:
        assert account is account_now.get() is None


async def test_a_home_that_takes_nothing_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path / "file/home"))
    model = Model(name="m", source="x")
    settings = Settings(models=(model,), ledger=Ledger(enabled=True, store=str(tmp_path / "ledger")))
    with pytest.raises(SettingsError, match="ledger: can't be kept below HYCLUSTER_HOME"):
        async with open_ledger(settings):
            raise AssertionError("it was opened")


async def test_it_is_on_where_callers_are_asked_or_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    models = (Model(name="m", source="x"),)
    for auth, said, on in ((False, None, False), (True, None, True), (True, False, False), (False, True, True)):
        settings = Settings(models=models, auth=Auth(enabled=auth), ledger=Ledger(enabled=said))
        async with open_ledger(settings) as keeper:
            assert (keeper is not None) is on
            assert (account_book.write_entry is not None) is on
    assert settings.ledger_place == str(tmp_path / "batches/ledger")
    assert Settings(models=models, batches=None, responses=None).ledger_place == str(tmp_path / "ledger")
