"""What becomes of a reservation, however its request goes and ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from hycluster.auth.caller import Caller
from hycluster.auth.limits import Limit
from hycluster.auth.store import Spent
from hycluster.errors import HyclusterError, QuotaExhausted, RateLimited, Unavailable
from hycluster.limits.limiter import MOST_REMEMBERED, Limiter
from hycluster.limits.reservation import RequestTokens, Reservation
from hycluster.limits.slots import SLOT_S
from hycluster.settings.price import Price
from tests.limits.virtual import Counts, World, run

TOKENS = Limit("acme", tokens_per_minute=1000)


async def reserve(process: Any, limit: Limit, tokens: int, prompts: int = 1) -> Reservation:
    made: Reservation = await process.limiter.reserve([limit], RequestTokens(0, 0, tokens), None, prompts)
    return made


async def tokens_in(process: Any, limit: Limit, seconds: float, world: World, uses: int, reserves: int) -> int:
    """What one who comes twice a second gets, and lets nobody see that he was refused."""
    got, ends_s = 0, world.now_s() + seconds
    while world.now_s() < ends_s:
        try:
            reservation = await reserve(process, limit, reserves)
        except HyclusterError:
            # Longer than until it is forgotten that he was.
            await asyncio.sleep(5)
            continue
        await asyncio.sleep(0.5)
        reservation.add(RequestTokens(0, 0, uses))
        reservation.end()
        got += uses
    return got


@pytest.mark.parametrize("uses", [150, 4000])
def test_who_uses_more_than_was_reserved_pays_it_off(uses: int) -> None:
    async def main() -> None:
        world = World(TOKENS)
        got = await tokens_in(world.process(), TOKENS, 1200, world, uses, 10)
        # But for what it was let in with before anything was known of it.
        assert 0.9 * 20 * 1000 <= got <= 1.1 * 20 * 1000 + 3 * uses

    run(main())


def test_what_is_owed_is_told_and_let_go_at_last() -> None:
    async def main() -> None:
        world = World(TOKENS)
        process = world.process()
        reservation = await reserve(process, TOKENS, 10)
        reservation.add(RequestTokens(0, 0, 5000))
        reservation.end()
        await asyncio.sleep(3)
        with pytest.raises(HyclusterError) as refused:
            await reserve(process, TOKENS, 10)
        assert 200 < (refused.value.retry_after_s or 0) < 300
        headers = process.limiter.headers([TOKENS])
        assert 200 < float(headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 301
        reservation = await reserve_later(process, 310)
        reservation.add(RequestTokens(0, 0, 10**12))
        reservation.end()
        await asyncio.sleep(30)
        await reserve_later(process, 61 * 60)

    async def reserve_later(process: Any, seconds: float) -> Reservation:
        await asyncio.sleep(seconds)
        return await reserve(process, TOKENS, 10)

    run(main())


def test_what_took_longer_than_a_minute_is_settled_too() -> None:
    limit = Limit("acme", tokens_per_day=1000)

    async def main() -> None:
        world = World(limit)
        process, other = world.process(), world.process()
        long = await reserve(process, limit, 10)
        for _ in range(10):
            await asyncio.sleep(60)
            # The book goes on.
            (await reserve(other, limit, 1)).end()
        long.add(RequestTokens(0, 0, 995))
        long.end()
        await asyncio.sleep(5)
        with pytest.raises(HyclusterError):
            await reserve(other, limit, 10)

    run(main())


def test_what_ends_before_its_prompts_is_settled_with_them() -> None:
    async def main() -> None:
        world = World(TOKENS)
        process = world.process()
        reservation = await reserve(process, TOKENS, 900, prompts=3)
        with reservation.asking():
            # As where a caller leaves: it is over before what it has begun has heard of that.
            reservation.end()
            reservation.give_up()
            reservation.give_up()
        await asyncio.sleep(3)
        (await reserve(process, TOKENS, 300)).end(counts=False)
        for _ in range(5):
            reservation.give_up()
        assert reservation.tokens.completion == 900
        with pytest.raises(HyclusterError):
            await reserve(process, TOKENS, 450)

    run(main())


def test_counts_are_kept_again_after_whatever_failed() -> None:
    limit = Limit("acme", tokens_per_day=1000)

    class Broken(Counts):
        broken = True

        def spend(self, spent: Mapping[Spent, int]) -> None:
            if self.broken:
                raise RuntimeError("not of the database's kinds")
            super().spend(spent)

    async def main() -> None:
        world = World(limit)
        world.counts = counts = Broken()
        process = world.process()
        reservation = await reserve(process, limit, 10)
        await asyncio.sleep(10)
        counts.broken = False
        reservation.add(RequestTokens(0, 0, 30))
        reservation.end()
        await asyncio.sleep(10)
        assert list(counts.all.values()) == [30]

    run(main())


def test_of_any_number_of_callers_not_all_are_remembered() -> None:
    async def main() -> None:
        limiter = World(TOKENS).process().limiter
        for number in range(2 * MOST_REMEMBERED):
            limiter.may_limit(Caller("other", f"p{number}", "alice"))
        assert len(limiter._limited) <= MOST_REMEMBERED + 1

    run(main())


def test_what_was_used_earlier_is_forgotten_here_too() -> None:
    async def main() -> None:
        world = World(TOKENS)
        process = world.process()
        for _ in range(600):
            (await reserve(process, TOKENS, 5)).end(counts=False)
            reservation = await reserve(process, TOKENS, 5)
            reservation.add(RequestTokens(0, 0, 5))
            reservation.end()
            await asyncio.sleep(1)
        assert int(process.limiter.headers([TOKENS])["x-ratelimit-remaining-tokens"]) > 600
        (holding,) = process.limiter._holdings.values()
        assert len(holding._usage.slots) <= 60 / SLOT_S

    run(main())


def test_at_midnight_nobody_is_told_of_a_quota_while_the_database_is_away() -> None:
    limit = Limit("acme", tokens_per_day=1000)

    class Away(Counts):
        def spent(self, periods: Any) -> dict[Spent, int]:
            raise Unavailable("auth.database: can't be used now")

    async def main() -> None:
        world = World(limit)
        process = world.process()
        (await reserve(process, limit, 10)).end()
        process.limiter._counts = Away()
        process.limiter._date = lambda: 1.8e9 + 86400
        with pytest.raises(Unavailable):
            await reserve(process, limit, 10)
        process.limiter._counts = world.counts
        await asyncio.sleep(5)
        (await reserve(process, limit, 10)).end()

    run(main())


def test_who_asks_for_more_than_a_limit_is_not_told_that_it_is_used_up() -> None:
    day, month = Limit("acme", tokens_per_day=1000), Limit("acme", budget_per_month=10**9)
    price = Price(completion_per_million_tokens=Decimal(10**6))

    async def main() -> None:
        limiter = World(TOKENS, day, month).process().limiter
        for limit, kind in ((TOKENS, RateLimited), (day, QuotaExhausted), (month, QuotaExhausted)):
            with pytest.raises(kind, match="never let in") as refused:
                await limiter.reserve([limit], RequestTokens(0, 0, 1001), price)
            assert refused.value.metadata["never"] == "true"
            assert "full again" not in refused.value.message
        # Of what is left nothing was taken, and a smaller one has room.
        (await limiter.reserve([day], RequestTokens(0, 0, 600), price)).end(counts=False)
        await limiter.reserve([day], RequestTokens(0, 0, 600), price)
        with pytest.raises(QuotaExhausted, match=r"is reached \(this request may use 500\); it is full again"):
            await limiter.reserve([day], RequestTokens(0, 0, 500), price)

    run(main())


def test_what_is_used_of_days_is_written_down_once_a_second_however_many_ask() -> None:
    """Each time is a transaction: one after the other, they took a tenth of a core."""
    day = Limit("acme", tokens_per_day=10**6)

    class Slow(Counts):
        calls = 0

        def spend(self, spent: Mapping[Spent, int]) -> None:
            self.calls += 1
            super().spend(spent)

    async def main() -> None:
        world = World(day)
        world.counts = counts = Slow()
        process, began_s = world.process(), world.now_s()
        for _ in range(1000):
            reservation = await reserve(process, day, 10)
            await asyncio.sleep(0.01)
            reservation.add(RequestTokens(0, 0, 7))
            reservation.end()
        took_s = world.now_s() - began_s
        await asyncio.sleep(1.1)
        assert sum(counts.all.values()) == 7 * 1000
        assert counts.calls <= took_s + 3

    run(main())


def test_a_day_and_a_month_end_on_time() -> None:
    date = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()

    async def main() -> None:
        nonlocal date
        limiter = Limiter(lambda: (), World().lease, Counts(), date=lambda: date)
        for seconds, day, month in (
            (0, "2026-12-31", "2026-12"),
            (1, "2027-01-01", "2027-01"),
            (-1, "2026-12-31", "2026-12"),
        ):
            date += seconds
            assert (limiter._period("tokens_per_day"), limiter._period("budget_per_month")) == (day, month)
            assert limiter._period("tokens_per_minute") == ""

    run(main())
