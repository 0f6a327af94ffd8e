from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from hycluster.auth.limits import Limit
from hycluster.ledger.books import Books
from hycluster.state import usage_state, usage_watch
from hycluster.state.usage_state import HOUR_S, limits_usage, span_usage
from hycluster.state.usage_watch import UsageWatch
from hycluster.state.usage_words import limit_of, money, named_owner
from hycluster.storage import locate
from tests.ledger.entries import MARCH, entry
from tests.state.made import LIMITS, NOW, made_usage, usage_sum
from tests.waiting import PATIENCE_S


@pytest.mark.parametrize(
    ("amount", "told"),
    [
        ("0", "0.00 USD"), ("12340.5", "12,340.50 USD"), ("0.0012345", "0.0012 USD"), ("0.25", "0.25 USD"),
        ("0.000000000001", "0.0000000000010 USD"), ("0.9949", "0.99 USD"), ("0.999", "1.00 USD"),
    ],
)  # fmt: skip
def test_money(amount: str, told: str) -> None:
    assert money(Decimal(amount), "usd") == told


def test_owners_the_dearest_first_and_the_rest_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_state, "MOST", 3)
    sums = [usage_sum("t", name, requests, cost) for name, requests, cost in
            (("a", 1, "0"), ("b", 2, "0"), ("c", 3, "0.5"), ("d", 4, "0"))]  # fmt: skip
    span = span_usage(HOUR_S, sums)
    assert [named_owner(each) for each in span.owners] == ["t/c", "t/d", "2 others"]
    assert [each.requests for each in span.owners] == [3, 4, 3]
    assert (span.total.requests, span.total.cost) == (10, Decimal("0.5"))
    (nobody,) = span_usage(HOUR_S, [usage_sum("", "", 1, "0")]).owners
    assert named_owner(nobody) == "whoever comes"


def test_limits_the_nearest_first() -> None:
    found = [(each.whose, each.model, round(each.share, 3), limit_of(each, "usd")) for each in made_usage().limits]
    assert [told[2] for told in found] == [0.974, 0.922, 0.915, 0.844, 0.067]
    assert found[1][3] == "461.00 USD of 500.00 USD a month"
    assert found[4][0] == "notebook key_5b2e"
    # Yesterday's tokens are no more of today's limit; a key that is gone has its id.
    later = limits_usage(LIMITS, {}, {("tenant:labs", "tokens_per_day", "2026-11-29"): 7}, lambda _: "", NOW + 86400)
    assert {each.share for each in later} == {0}
    assert {each.whose for each in later if each.of == "key"} == {"key_5b2e"}


class Ring:
    """A keyring with one limit."""

    limits = (Limit("acme", "search", requests_per_minute=10, tokens_per_day=100),)

    def __init__(self) -> None:
        self.store = self
        self.away = False

    def spent(self, periods: list[str]) -> dict[tuple[str, str, str], int]:
        if self.away:
            raise OSError("away")
        return {("project:acme/search", "tokens_per_day", period): 40 for period in periods}

    def key_name(self, _: str) -> str:
        return ""


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(locate(str(tmp_path), "ledger.store").writable())


async def used() -> Mapping[tuple[str, str], int]:
    return {("project:acme/search", "requests_per_minute"): 9}


async def test_the_watch_reads_while_somebody_looks(
    books: Books, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("time.time", lambda: MARCH + 60)
    monkeypatch.setattr(usage_watch, "READ_EVERY_S", 0.0)
    monkeypatch.setattr(usage_watch, "SPARED", 0)
    books.commit("a", [entry()])
    ring: Any = Ring()
    watch = UsageWatch(books, ring, used, "usd")
    state = await watch.now()
    assert [(part.span_s, [named_owner(each) for each in part.owners]) for part in state.spans] == [
        (3600, ["acme/search"]), (86400, ["acme/search"]),
    ]  # fmt: skip
    assert [(each.kind, each.share) for each in state.limits] == [
        ("requests_per_minute", 0.9), ("tokens_per_day", 0.4),
    ]  # fmt: skip
    books.commit("b", [entry(project="chat")])
    assert len((await watch.now()).spans[0].owners) == 2
    # What was known goes on to be shown while something is away, and it is said.
    ring.away = True
    monkeypatch.setattr(books, "days", lambda: 1 / 0)
    state = await watch.now()
    assert state.problems == (
        "the usage ledger can't be read: ZeroDivisionError", "how near limits are can't be read: OSError",
    )  # fmt: skip
    assert (len(state.spans[0].owners), len(state.limits)) == (2, 2)
    assert caplog.text.count("can't be read") >= 2
    await watch.close()


async def test_nobody_waits_for_a_store_far_away(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_watch, "WAITS_S", 0.01)
    comes, days = threading.Event(), books.days

    def slow() -> list[str]:
        comes.wait()
        return days()

    monkeypatch.setattr(books, "days", slow)
    watch = UsageWatch(books, None, used, "usd")
    # Several who look have it read once.
    assert [state.at for state in await asyncio.gather(watch.now(), watch.now())] == [0, 0]
    comes.set()
    monkeypatch.setattr(usage_watch, "WAITS_S", PATIENCE_S)
    assert (await watch.now()).at > 0
    assert (await watch.now()).limits == ()
    await watch.close()
