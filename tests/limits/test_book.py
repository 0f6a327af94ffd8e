from __future__ import annotations

from hycluster.limits.book import LeaseAsk, LeaseBook

MINUTE, PLACES, DAY = (
    ("tenant:t", "tokens_per_minute"),
    ("tenant:t", "concurrent_requests"),
    ("key:k", "tokens_per_day"),
)


def test_what_is_used_of_each_limit() -> None:
    now_s = 100.0
    book = LeaseBook(lambda: now_s)
    now_s += 10
    name = book.lease("a", "", {}).book

    def ask(who: str, wanted: int) -> None:
        asks = {each: LeaseAsk(limit=100, want=wanted, need=wanted) for each in (MINUTE, PLACES)}
        asks[DAY] = LeaseAsk(limit=100, period="2026-11-30", want=wanted, need=wanted)
        book.lease(who, name, asks)

    assert book.used() == {}
    ask("a", 7)
    ask("b", 3)
    # Of days the database knows.
    assert book.used() == {MINUTE: 10, PLACES: 10}
    now_s += 61
    assert book.used() == {MINUTE: 0, PLACES: 10}
