from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from hycluster.ledger.books import Books
from hycluster.ledger.journal import UsageJournal
from hycluster.ledger.recent import RecentUsage
from hycluster.ledger.usage import UsageSum, sum_usage
from hycluster.storage import locate
from tests.ledger.entries import MARCH, entry

HOUR_S, DAY_S = 3600, 86400
NOON = MARCH + DAY_S / 2


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(locate(str(tmp_path / "ledger"), "ledger.store").writable(), tmp_path / "open")


def test_the_last_hour_and_the_last_day(books: Books, tmp_path: Path) -> None:
    books.commit("a", [entry(ended_at=NOON - 2 * DAY_S), entry(ended_at=NOON - DAY_S + 60), entry(ended_at=NOON - 90)])
    books.commit("b", [entry(ended_at=NOON - 70, project="chat"), entry(ended_at=NOON - 70, cost=Decimal("0.000001"))])
    # Not committed yet.
    (tmp_path / "open").mkdir()
    journal = UsageJournal(tmp_path / "open")
    journal.append(entry(ended_at=NOON - 1, output_tokens=100).line())
    recent = RecentUsage(books)
    for _ in range(2):
        hour, day = recent.by_project([HOUR_S, DAY_S], NOON)
        chat, search = {"tenant": "acme", "project": "chat"}, {"tenant": "acme", "project": "search"}
        assert hour == [
            UsageSum(chat, None, 1, 10, 4, 5, Decimal("0.25")),
            UsageSum(search, None, 3, 30, 12, 110, Decimal("0.500001")),
        ]
        assert [each.requests for each in day] == [1, 4]
        assert day == sum_usage(books, ["tenant", "project"], since=NOON - DAY_S)
    journal.close()


def test_each_part_is_read_once(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        books.commit(f"piece-{number}", [entry(ended_at=NOON - 5)])
    read: list[str] = []
    whole: Any = books.folder.read_whole
    opened: Any = books.folder.open_file

    def counted(what: Any) -> Any:
        def call(path: str) -> Any:
            read.append(path)
            return what(path)

        return call

    monkeypatch.setattr(books.folder, "read_whole", counted(whole))
    monkeypatch.setattr(books.folder, "open_file", counted(opened))
    recent = RecentUsage(books)
    assert recent.by_project([HOUR_S], NOON)[0][0].requests == 3
    assert len([path for path in read if path.endswith(".parquet")]) == 3
    read.clear()
    books.commit("late", [entry(ended_at=NOON - 3)])
    read.clear()
    assert recent.by_project([HOUR_S], NOON)[0][0].requests == 4
    # The new one's record and its part; beside these, whether a day has its manifest.
    assert sorted(path.rpartition("/")[2][:9] for path in read if "_manifest" not in path) == ["late.json", "part-late"]
    # A day that is over becomes a file, and its pieces go.
    books.tidy(NOON + 2 * DAY_S)
    monkeypatch.setattr("time.time", lambda: NOON + 3 * DAY_S)
    books.tidy(NOON + 3 * DAY_S)
    assert recent.by_project([HOUR_S], NOON)[0][0].requests == 4


def test_of_an_answer_that_was_begun_again_the_last_line_counts(books: Books) -> None:
    books.commit("a", [entry(once="resp_1", ended_at=NOON - 1, input_tokens=2), entry(once="resp_2", ended_at=NOON)])
    books.commit("b", [entry(once="resp_1", ended_at=NOON - 2, input_tokens=1), entry(ended_at=NOON)])
    ((found,),) = RecentUsage(books).by_project([HOUR_S], NOON + 1)
    assert (found.requests, found.input_tokens) == (3, 2 + 10 + 10)
