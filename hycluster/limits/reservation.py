"""What a request has reserved of the limits that it meets, until its end tells what it used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from hycluster.auth.limits import BILLION
from hycluster.limits.holding import Holding
from hycluster.settings.price import Price, cost_of


@dataclass(frozen=True, slots=True)
class RequestTokens:
    """What a request has used, or may use."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def amount(self, kind: str, price: Price | None) -> int:
        """In the unit of a limit."""
        if kind in ("requests_per_minute", "concurrent_requests"):
            return 1
        if kind == "budget_per_month":
            cost = cost_of(price, self.prompt, self.cached, self.completion) * BILLION
            return int(cost.to_integral_value(rounding="ROUND_CEILING"))
        return self.prompt + self.completion


@dataclass(slots=True)
class Share:
    """What is reserved of one limit."""

    holding: Holding
    reserved: int
    period: str


class Reservation:
    """Made by :class:`hycluster.limits.limiter.Limiter`; has to be ended.

    Args:
        shares: what is reserved.
        at_s: when that was, on the monotonic clock.
        spend: is told what of a day's or month's limit was used beyond what was reserved, or less.
        prompts: that ``expected`` is of.

    Attributes:
        expected: what it may use.
        tokens: used so far; whoever carries the request out keeps it.
        began: a model has been asked.
    """

    def __init__(
        self,
        shares: list[Share],
        expected: RequestTokens,
        price: Price | None,
        at_s: float,
        spend: Callable[[Share, int], None],
        clock: Callable[[], float],
        prompts: int = 1,
    ) -> None:
        self.shares = shares
        self.expected = expected
        self.tokens = RequestTokens()
        self.began = False
        self._price = price
        self._at_s = at_s
        self._spend = spend
        self._clock = clock
        self._prompts = self._left = max(1, prompts)
        self._asking = 0
        self._ended, self._counts = False, True

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Within it engines have one of the prompts. What ends before, as a request whose caller has left, is settled
        when it is known what was used."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            if self._ended and not self._asking:
                self._settle()

    def give_up(self) -> None:
        """Of one of the prompts nothing was told, and what engines have done for it is known to nobody: it counts as
        expected."""
        self.began = True
        if self._left:
            self._left -= 1
            each = (-(-tokens // self._prompts) for tokens in (self.expected.prompt, 0, self.expected.completion))
            self.add(RequestTokens(*each))

    def add(self, tokens: RequestTokens) -> None:
        """One of the prompts of the request has been answered, or given up: so much was used."""
        now = self.tokens
        self.tokens = RequestTokens(
            now.prompt + tokens.prompt, now.cached + tokens.cached, now.completion + tokens.completion
        )

    def end(self, *, counts: bool = True) -> None:
        """Settle. Whoever was let in and then turned away for the service's own sake, before a model was asked, has
        used nothing (``counts``)."""
        if self._ended:
            return
        self._ended, self._counts = True, counts
        if not self._asking:
            self._settle()

    def _settle(self) -> None:
        now_s = self._clock()
        for share in self.shares:
            kind = share.holding.name[1]
            used = self.tokens.amount(kind, self._price) if self._counts or self.began else 0
            share.holding.settle(share.reserved, used, now_s - self._at_s, share.period, now_s)
            if share.period and used != share.reserved:
                self._spend(share, used - share.reserved)


# That of the request that is being carried out; None where none is limited.
current_reservation: ContextVar[Reservation | None] = ContextVar("current_reservation", default=None)


@contextmanager
def reserving(reservation: Reservation | None) -> Iterator[None]:
    """What is asked of models within, is asked for this one."""
    token = current_reservation.set(reservation)
    try:
        yield
    finally:
        current_reservation.reset(token)
