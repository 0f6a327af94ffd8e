from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from hycluster.ledger.books import Books
from hycluster.ledger.usage import UsageSum, sum_usage
from hycluster.storage import locate
from tests.ledger.entries import MARCH, entry

HOUR_S = 3600


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(locate(str(tmp_path), "ledger.store").writable())


def test_an_empty_ledger_has_no_sums(books: Books) -> None:
    assert sum_usage(books) == []
    assert sum_usage(books, ["project"], bucket_s=60) == []


def test_sums_by_whose_and_by_time(books: Books) -> None:
    books.commit(
        "a",
        [
            entry(),
            entry(ended_at=MARCH + HOUR_S + 1, cost=Decimal("0.000001")),
            # The rest of that one.
            entry(ended_at=MARCH + HOUR_S + 2, requests=0, input_tokens=0, cached_tokens=0, output_tokens=7),
            entry(project="chat", model="n", tier="batch"),
        ],
    )
    assert sum_usage(books) == [UsageSum({}, None, 3, 30, 12, 22, Decimal("0.750001"))]
    assert sum_usage(books, ["project", "model"]) == [
        UsageSum({"project": "chat", "model": "n"}, None, 1, 10, 4, 5, Decimal("0.25")),
        UsageSum({"project": "search", "model": "m"}, None, 2, 20, 8, 17, Decimal("0.500001")),
    ]
    by_hour = sum_usage(books, ["tier"], bucket_s=HOUR_S, only={"project": ["search"]})
    assert [(each.start_at, each.group, each.requests) for each in by_hour] == [
        (MARCH, {"tier": "online"}, 1),
        (MARCH + HOUR_S, {"tier": "online"}, 1),
    ]
    (key,) = sum_usage(books, ["key"], since=MARCH + HOUR_S)
    assert (key.group, key.requests) == ({"key": "key_1", "key_name": "ci"}, 1)


def test_of_an_answer_that_was_begun_again_the_last_line_counts(books: Books) -> None:
    books.commit("a", [entry(once="resp_1", ended_at=MARCH + 5, input_tokens=2), entry(once="resp_2")])
    books.commit("b", [entry(once="resp_1", ended_at=MARCH + 3, input_tokens=1), entry()])
    (found,) = sum_usage(books)
    assert (found.requests, found.input_tokens) == (3, 2 + 10 + 10)
