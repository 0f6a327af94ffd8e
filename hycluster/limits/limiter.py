"""Lets requests in by the limits that their callers have; one for each process that callers come to.

No request makes a call of its own: what it needs is reserved of the leases that are here, or ahead of them where the
limit is far, or it waits a moment for the next word of the directory's book, which is asked for all limits at once:
twice a second, sooner where requests wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from hycluster.auth.caller import Caller
from hycluster.auth.limits import Limit
from hycluster.auth.store import Spent
from hycluster.errors import HyclusterError, QuotaExhausted, RateLimited, Unavailable
from hycluster.limits.book import ASK_EVERY_S, GONE_AFTER_S, PERIODS, LeaseAnswer, LeaseAsk, Name
from hycluster.limits.holding import HELD_S, Holding
from hycluster.limits.reservation import RequestTokens, Reservation, Share
from hycluster.settings.price import Price

if TYPE_CHECKING:
    from hycluster.auth.keyring import Keyring

logger = logging.getLogger(__name__)

# Between two words to the book, however many requests wait.
PAUSE_S = 0.05
# How long a request waits for a lease; a book that starts anew takes nearly as long before it gives any.
WAITS_S = 2.0
# A book that is silent for so long is away.
AWAY_AFTER_S = 1.0
SPEND_EVERY_S = 1.0
# Callers, and those with models, of whom it is remembered which limits they meet.
MOST_REMEMBERED = 10_000
# What of limits is told with each answer.
TOLD = {"requests_per_minute": "requests", "tokens_per_minute": "tokens"}
UNITS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "tokens_per_day": "tokens a day",
    "concurrent_requests": "requests at a time",
    "budget_per_month": "a month's budget",
}

# (who, the book it believes to talk to, what it asks) -> the book's answer.
Lease = Callable[[str, str, dict[Name, LeaseAsk]], Awaitable[LeaseAnswer]]

# Since the process began, requests that were refused, by the kind of limit and by whose it was.
refused: Counter[tuple[str, str]] = Counter()


class Counts(Protocol):
    """Where what is used of days and months is kept. Both block."""

    def spend(self, spent: Mapping[Spent, int]) -> None: ...

    def spent(self, periods: Iterable[str]) -> dict[Spent, int]: ...


class Limiter:
    """Args:
    limits: those that are known now; the same object for as long as nothing has changed.
    lease: asks the directory's book; raises if it is away.
    counts: the database's.
    clock: seconds, monotonic.
    date: seconds since the epoch.
    """

    def __init__(
        self,
        limits: Callable[[], tuple[Limit, ...]],
        lease: Lease,
        counts: Counts,
        *,
        clock: Callable[[], float] = time.monotonic,
        date: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits
        self._lease = lease
        self._counts = counts
        self._clock = clock
        self._date = date
        self._id = secrets.token_hex(8)
        self._met: dict[tuple[str, str, str, str], list[Limit]] = {}
        self._met_of: tuple[Limit, ...] = ()
        self._limited: dict[tuple[str, str, str], bool] = {}
        self._limited_of: tuple[Limit, ...] = ()
        self._holdings: dict[Name, Holding] = {}
        self._waiting: dict[Name, list[int]] = {}
        self._wake = asyncio.Event()
        self._answered: asyncio.Future[None] | None = None
        self._book, self._words = "", 0
        self._answered_s = float("-inf")
        self._away = False
        # Of the minute that the date was last looked up in.
        self._minute, self._day, self._month = float("-inf"), "", ""
        self._pending: Counter[Spent] = Counter()
        self._wanted_counts = asyncio.Event()

    # -- requests -----------------------------------------------------------------------------------------

    def may_limit(self, caller: Caller | None) -> bool:
        """Whether this caller has any limit, be it for one model; the rest need not be looked at more closely."""
        limits = self._limits()
        if caller is None or not limits:
            return False
        if limits is not self._limited_of:
            self._limited, self._limited_of = {}, limits
        key = (caller.tenant, caller.project, caller.key_id)
        if key not in self._limited:
            # An identity provider may know any number of projects.
            if len(self._limited) > MOST_REMEMBERED:
                self._limited.clear()
            self._limited[key] = any(limit.concerns(caller, limit.model or "") for limit in limits)
        return self._limited[key]

    def concerning(self, caller: Caller | None, model: str) -> list[Limit]:
        """The limits that a request meets; mostly none, which costs next to nothing to know."""
        limits = self._limits()
        if caller is None or not limits:
            return []
        if limits is not self._met_of:
            self._met, self._met_of = {}, limits
            for holding in self._holdings.values():
                holding.limit = (
                    next((each.values.get(holding.name[1], 0) for each in limits if each.subject == holding.name[0]), 0)
                    or holding.limit
                )
        key = (caller.tenant, caller.project, caller.key_id, model)
        if key not in self._met:
            # Models that are none are refused later, and callers may name any number of them.
            if len(self._met) > MOST_REMEMBERED:
                self._met.clear()
            self._met[key] = [limit for limit in limits if limit.concerns(caller, model)]
        return self._met[key]

    async def reserve(
        self, met: list[Limit], expected: RequestTokens, price: Price | None = None, prompts: int = 1
    ) -> Reservation:
        """Let a request in that meets these limits, with what it may use of them.

        Args:
            expected: by all of its prompts together.

        Raises:
            RateLimited, QuotaExhausted: or not.
            Unavailable: that can't be told now.
        """
        shares = []
        for limit in met:
            for kind, value in limit.values.items():
                amount = expected.amount(kind, price)
                name: Name = (limit.subject, kind)
                holding = self._holdings.get(name) or self._holdings.setdefault(name, Holding(name, value))
                shares.append(Share(holding, amount, self._period(kind)))
        shares = [share for share in shares if share.reserved]
        for share in shares:
            if share.reserved > share.holding.limit:
                raise self._refusal(share, 0.0, never=True)
        now_s = began_s = self._clock()
        for share in shares:
            share.holding.want(share.reserved, now_s)
        while short := [share for share in shares if not share.holding.has(share.reserved, now_s)]:
            help_itself = Holding.help_itself if self._away else Holding.go_ahead
            if all(help_itself(share.holding, share.reserved, now_s) for share in short):
                continue
            dry = next((share for share in short if self._away or share.holding.is_dry(now_s)), None)
            if dry is not None or now_s - began_s >= WAITS_S:
                share = dry or short[0]
                raise self._refusal(share, share.holding.refuse(share.reserved, now_s))
            await self._next_word(short)
            now_s = self._clock()
        for share in shares:
            share.holding.take(share.reserved)
            if share.period:
                self._spend(share, share.reserved)
        return Reservation(shares, expected, price, now_s, self._spend, self._clock, prompts)

    def headers(self, met: list[Limit]) -> dict[str, str]:
        """What OpenAI's clients read of the limits, the tightest of each kind."""
        now_s, told = self._clock(), {}
        for kind, unit in TOLD.items():
            names = [(limit.subject, kind) for limit in met if kind in limit.values]
            holdings = [self._holdings[name] for name in names if name in self._holdings]
            if holdings:
                tightest = min(holdings, key=lambda holding: holding.remaining)
                told[f"x-ratelimit-limit-{unit}"] = str(tightest.limit)
                told[f"x-ratelimit-remaining-{unit}"] = str(tightest.remaining)
                told[f"x-ratelimit-reset-{unit}"] = f"{tightest.reset_s(now_s):.3f}".rstrip("0").rstrip(".") + "s"
        return told

    def _refusal(self, share: Share, wait_s: float, *, never: bool = False) -> HyclusterError:
        subject, kind = share.holding.name
        of = subject.partition(":")[0]
        what = f"{kind}: this {of}'s limit"
        metadata = {"limit": kind, "of": of}
        # Whether there is enough is not known while there is no book that has heard of it, nor of a day that has begun
        # while the database is away.
        if not never and (not share.holding.known or self._lacks_base(share.holding)):
            return Unavailable(f"{what} can't be looked up now", retry_after_s=1)
        refused[kind, of] += 1
        limit = share.holding.limit
        # What is left may be more than nothing.
        asked = f" (this request may use {share.reserved})" if kind.startswith("tokens") else ""
        error: HyclusterError
        if never:
            metadata["never"] = "true"
            told = f"is {limit} {UNITS[kind]}; a request for {share.reserved}"
            if kind == "budget_per_month":
                # How much that is, its callers are not told.
                told = "is less than this request may cost; it"
            # Nothing comes of waiting for the next day or month.
            error = (QuotaExhausted if kind in PERIODS else RateLimited)(f"{what} {told} is never let in")
        elif kind == "budget_per_month":
            error = QuotaExhausted(f"{what} is reached; it is full again next month")
        elif kind in PERIODS:
            reached = f"{what} of {limit} {UNITS[kind]} is reached{asked}"
            error = QuotaExhausted(f"{reached}; it is full again at midnight UTC")
        else:
            reached = f"{what} of {limit} {UNITS[kind]} is reached{asked}"
            error = RateLimited(reached, retry_after_s=max(wait_s, ASK_EVERY_S))
        error.metadata = metadata
        return error

    def _period(self, kind: str) -> str:
        if kind not in PERIODS:
            return ""
        date = self._date()
        if not self._minute <= date < self._minute + 60:
            self._minute = date // 60 * 60
            day = datetime.fromtimestamp(date, UTC).strftime("%Y-%m-%d")
            self._day, self._month = day, day[:7]
        return self._month if kind == "budget_per_month" else self._day

    def _spend(self, share: Share, amount: int) -> None:
        self._pending[(*share.holding.name, share.period)] += amount

    async def _next_word(self, short: list[Share]) -> None:
        for share in short:
            self._waiting.setdefault(share.holding.name, []).append(share.reserved)
        if self._answered is None:
            self._answered = asyncio.get_running_loop().create_future()
        self._wake.set()
        if any(self._lacks_base(share.holding) for share in short):
            self._wanted_counts.set()
        try:
            async with asyncio.timeout(WAITS_S):
                await asyncio.shield(self._answered)
        except TimeoutError:
            pass
        finally:
            for share in short:
                self._waiting[share.holding.name].remove(share.reserved)

    # -- the book -----------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """LeaseAsk the book again and again; runs until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                # Where nothing is limited there is nothing to do.
                async with asyncio.timeout(ASK_EVERY_S if self._holdings else None):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.ask()
            except Exception:
                logger.exception("limits: the book can't be asked; trying again")
            await asyncio.sleep(PAUSE_S)

    async def ask(self) -> None:
        """One word to the book, and its answer."""
        now_s = self._clock()
        self._holdings = {
            name: holding
            for name, holding in self._holdings.items()
            if self._waiting.get(name) or not holding.is_idle(now_s)
        }
        self._waiting = {name: amounts for name, amounts in self._waiting.items() if amounts}
        if not self._holdings:
            return
        self._words += 1
        asked = {
            name: holding.ask(
                self._words,
                self._book,
                self._period(name[1]),
                sum(self._waiting.get(name, ())),
                min(self._waiting.get(name, ()), default=0),
                now_s,
            )
            for name, holding in self._holdings.items()
            if not self._lacks_base(holding)
        }
        holdings = dict(self._holdings)
        answer: LeaseAnswer | None = None
        try:
            async with asyncio.timeout(AWAY_AFTER_S):
                answer = await self._lease(self._id, self._book, asked)
        except Exception as error:
            if not self._away:
                logger.warning("limits: the directory is away (%s); each process goes on with its part", error)
        if answer is None or not answer.told:
            for name, ask in asked.items():
                holdings[name].unheard(ask)
        now_s = self._clock()
        if answer is None:
            self._away = True
            if now_s - self._answered_s > GONE_AFTER_S - 2 * HELD_S:
                for holding in holdings.values():
                    holding.lose()
        else:
            self._book, self._answered_s, self._away = answer.book, now_s, False
            for name, told in answer.told.items():
                holdings[name].hear(asked[name], told, answer, now_s)
        if answer is not None and asked and not answer.told:
            # It is new, and is to hear all first.
            self._wake.set()
        elif self._answered is not None:
            self._answered.set_result(None)
            self._answered = None

    async def keep_counts(self) -> None:
        """Write down what is used of days and months, and read what was; runs until cancelled.

        Once a second, or when a request waits for what was used before.
        """
        while True:
            await self.exchange_counts()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SPEND_EVERY_S):
                    await self._wanted_counts.wait()
            self._wanted_counts.clear()

    async def exchange_counts(self) -> None:
        """Do so once."""
        pending, self._pending = self._pending, Counter()
        lacking = [holding for holding in self._holdings.values() if self._lacks_base(holding)]
        try:
            if pending:
                await asyncio.to_thread(self._counts.spend, pending)
                pending = Counter()
            if lacking:
                periods = {holding: self._period(holding.name[1]) for holding in lacking}
                found = await asyncio.to_thread(self._counts.spent, sorted({*periods.values()}))
                for holding, period in periods.items():
                    holding.set_base(period, found.get((*holding.name, period), 0))
                self._wake.set()
        except Exception as error:
            # Whatever it is: unless it is tried again, nothing is counted any more, nor let in from midnight on.
            known = isinstance(error, HyclusterError)
            logger.warning(
                "limits: what is used of days and months can't be kept now: %s",
                error,
                exc_info=None if known else error,
            )
            # Added and not set: a Counter drops what is not above zero.
            for spent, amount in pending.items():
                self._pending[spent] += amount
            await asyncio.sleep(SPEND_EVERY_S)

    def _lacks_base(self, holding: Holding) -> bool:
        """What was used of its day or month before this process began is not known yet."""
        kind = holding.name[1]
        return kind in PERIODS and not holding.has_base(self._period(kind))


@contextlib.asynccontextmanager
async def open_limiter(keyring: Keyring | None, directory: Callable[[], Any]) -> AsyncIterator[Limiter | None]:
    """The limiter of a process; None where nobody's limits are known.

    Args:
        directory: gives the directory's handle; blocks.
    """
    if keyring is None:
        yield None
        return
    handle = await asyncio.to_thread(directory)

    async def lease(who: str, book: str, asks: dict[Name, LeaseAsk]) -> LeaseAnswer:
        answer: LeaseAnswer = await handle.lease.remote(who, book, asks)
        return answer

    async with following(Limiter(lambda: keyring.limits, lease, keyring.store)) as limiter:
        yield limiter


@contextlib.asynccontextmanager
async def following(limiter: Limiter) -> AsyncIterator[Limiter]:
    """A limiter at work."""
    tasks = [asyncio.create_task(limiter.follow()), asyncio.create_task(limiter.keep_counts())]
    try:
        yield limiter
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await limiter.exchange_counts()
