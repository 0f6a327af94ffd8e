"""What is committed is there once, whoever commits it, however often, and whenever he is killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.ledger.books import FOLD_AFTER_S, KEPT_S, Books
from hycluster.ledger.entry import Entry
from hycluster.ledger.journal import UsageJournal
from hycluster.ledger.usage import sum_usage
from hycluster.storage import locate
from tests.ledger.entries import MARCH, entry
from tests.object_store import ObjectStore

DAY_S = 86400


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(locate(str(tmp_path / "ledger"), "ledger.store").writable(), tmp_path / "open")


def requests(books: Books, **asked: Any) -> int:
    return sum(each.requests for each in sum_usage(books, **asked))


def test_a_piece_counts_once_and_by_the_day_of_its_ends(books: Books) -> None:
    mine = [entry(), entry(ended_at=MARCH + DAY_S)]
    for _ in range(2):
        books.commit("a", mine)
    books.commit("b", [entry()])
    assert books.days() == ["2026-03-01", "2026-03-02"]
    assert [(each.group["day"], each.requests) for each in sum_usage(books, ["day"])] == [
        ("2026-03-01", 2),
        ("2026-03-02", 1),
    ]
    assert requests(books, since=MARCH + DAY_S) == 1
    assert requests(books, until=MARCH + DAY_S) == 2


def test_of_two_attempts_the_first_record_counts(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Books, "holds", lambda *_: False)
    books.commit("a", [entry(input_tokens=1)])
    books.commit("a", [entry(input_tokens=2)])
    (found,) = sum_usage(books)
    assert (found.requests, found.input_tokens) == (1, 1)
    # The loser has taken its own away.
    assert len(list(books.folder.names("2026-03-01"))) == 1


def test_an_attempt_without_a_record_counts_for_nothing(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(books.folder)
    with monkeypatch.context() as patched:

        def killed(*_: Any) -> bool:
            raise KeyboardInterrupt

        patched.setattr(kind, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            books.commit("a", [entry()])
    assert requests(books) == 0
    books.commit("a", [entry()])
    assert requests(books) == 1
    assert len(list(books.folder.names("2026-03-01"))) == 2


def test_a_day_that_is_over_becomes_one_file(books: Books, tmp_path: Path) -> None:
    for number in range(5):
        books.commit(f"p{number}", [entry(input_tokens=number)])
    over = MARCH + DAY_S + FOLD_AFTER_S + 1
    books.tidy(over - 2)
    assert "_manifest.json" not in set(books.folder.names("2026-03-01"))
    books.tidy(over)
    manifest = json.loads((tmp_path / "ledger/2026-03-01/_manifest.json").read_text())
    assert manifest["pieces"] == [f"p{number}" for number in range(5)]
    # Late, from a machine that was away; and one of the pieces once more.
    books.commit("late", [entry(input_tokens=100)])
    books.commit("p3", [entry(input_tokens=3)])
    for now in (over, manifest["made_at"] + KEPT_S + 1, manifest["made_at"] + 3 * KEPT_S):
        (found,) = sum_usage(books)
        assert (found.requests, found.input_tokens) == (6, 110)
        books.tidy(now)
    left = set(books.folder.names("2026-03-01"))
    assert len(left) == 3, left
    assert set(books.folder.names("2026-03-01/_pieces")) == {"late.json"}
    # And still nobody can put one in twice.
    books.commit("p3", [entry(input_tokens=3)])
    assert requests(books) == 6
    assert pq.read_table(tmp_path / "ledger/2026-03-01" / manifest["file"]["path"]).num_rows == 5


def test_what_is_swept_while_it_is_read_is_read_again(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        books.commit(f"p{number}", [entry()])
    look = Books._manifest

    def before_it_was_made(self: Books, day: str) -> Any:
        monkeypatch.setattr(Books, "_manifest", look)
        self.tidy(MARCH + 2 * DAY_S)
        self.tidy(time.time() + 2 * KEPT_S)

    monkeypatch.setattr(Books, "_manifest", before_it_was_made)
    assert requests(books) == 3
    assert not list(books.folder.names("2026-03-01/_pieces"))


def test_what_is_not_committed_yet_is_counted(books: Books) -> None:
    assert books.journals is not None
    journal = UsageJournal(books.journals)
    journal.append(entry().line())
    assert requests(books) == 1
    (file,) = books.journals.iterdir()
    # Committed, and its file not deleted yet.
    books.commit(file.stem, [entry()])
    assert requests(books) == 1
    journal.close()


def test_in_a_bucket(store: ObjectStore) -> None:
    books = Books(locate(store.uri("ledger"), "ledger.store").writable())
    for _ in range(2):
        books.commit("a", [entry(), entry(ended_at=MARCH + DAY_S)])
    books.tidy(MARCH + 2 * DAY_S)
    assert requests(books) == 2
    assert requests(books, since=MARCH + DAY_S) == 1


def test_entries_come_out_as_they_went_in(books: Books) -> None:
    mine = entry(tenant="ü", model="a/b:c", requests=0)
    books.commit("a", [mine])
    (table,) = books.tables()
    assert isinstance(table, pa.Table)
    assert [Entry(**row) for row in table.to_pylist()] == [mine]
