"""Who of several tenants is served next in one engine: the one that has had the least, by its weight. Pure.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588): each tenant
has a counter of the tokens that were computed for it, divided by its weight, and the lowest counter goes first. Two
tenants that both always have something waiting so get tokens by their weights, whatever the number and the length of
their requests; and whoever has asked for nothing for a while has saved up no more than a burst: when it comes back its
counter is lifted to less than that below the lowest of those who wait.

A prompt is charged as a whole when it is let in, but for what the prefix cache has of it, so that the next choice knows
of it; a token of an output when it is computed. What is computed again, since its row was preempted, is nobody's fault
and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# What a token of an output counts, in tokens of a prompt: as in the paper. An output's tokens are computed one a step.
OUTPUT_COST = 2.0
# What was computed so long ago counts 1/e of what is now, where it is asked for what was lately.
RECENT_S = 20.0
_TENANT, _WEIGHT = "hycluster-tenant", "hycluster-weight"
# Counters that are kept of tenants that have nothing here.
MOST_IDLE = 1024


@dataclass(slots=True, eq=False)
class TenantAccount:
    """What one tenant has had.

    Attributes:
        weight: above 0; with twice as much of it, twice as many tokens are the same to it.
        served: tokens that were computed for it, by what they cost and by its weight.
        recent: of ``served``, what was so lately.
        rows: requests that it has in the engine's slots, as far as that is followed; see ``shares.py``.
    """

    tenant: str
    weight: float = 1.0
    served: float = 0.0
    recent: float = 0.0
    rows: int = 0
    _at_s: float = 0.0

    def charge(self, tokens: float) -> None:
        self.served += tokens / self.weight
        self.recent += tokens / self.weight

    def pass_time(self, now_s: float) -> None:
        """Let what was lately be less so."""
        self.recent *= math.exp(min(0.0, self._at_s - now_s) / RECENT_S)
        self._at_s = now_s

    @property
    def turn(self) -> tuple[float, float]:
        """The lowest is served next. Of two that have had the same, as where one has just come back: the one that has
        less now."""
        return self.served, self.rows / self.weight


@dataclass(slots=True, eq=False)
class Bill:
    """One request's part of it.

    Attributes:
        paid: of its tokens, prompt and output, so many have been charged.
    """

    account: TenantAccount
    paid: int = 0

    def admit(self, prompt: int, tokens: int, cached: int) -> None:
        """It is let in; what it was charged before, it is not charged again.

        Args:
            prompt: its tokens.
            tokens: these and those of its output so far.
            cached: of these, those that need not be computed.
        """
        if not self.paid:
            self.account.charge(max(0, prompt - cached))
        self.paid = max(self.paid, tokens)

    def compute(self, until: int) -> None:
        """Its tokens are computed up to this one."""
        if until > self.paid:
            self.account.charge(OUTPUT_COST * (until - self.paid))
            self.paid = until


class TenantAccounts:
    """Those of all tenants of one engine, for requests that go to the same queue.

    Args:
        burst: tokens that whoever comes back may have before it counts as served like those who were there.
    """

    def __init__(self, burst: float = 0.0) -> None:
        self._burst = burst
        self._accounts: dict[str, TenantAccount] = {}
        # What those had had that were let in.
        self._last = 0.0

    def __len__(self) -> int:
        return len(self._accounts)

    def open(self, tenant: str, weight: float, waiting: Collection[TenantAccount]) -> Bill:
        """A request comes.

        Args:
            waiting: the accounts that have a request in the queue, before this one comes into it. Those of requests
                that go to another queue don't count: their counters began elsewhere.
        """
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = TenantAccount(tenant)
        account.weight = weight
        if account not in waiting:
            mine = (each for each in waiting if self._accounts.get(each.tenant) is each)
            floor = min((each.served for each in mine), default=self._last)
            account.served = max(account.served, floor - self._burst / weight)
        return Bill(account)

    def admitted(self, account: TenantAccount) -> None:
        """One of its requests is about to be computed."""
        self._last = max(self._last, account.served)

    def keep(self, busy: Collection[TenantAccount]) -> None:
        """Forget most of those that have nothing here, if they are many: those that would be lifted most."""
        if len(self._accounts) - len(busy) > MOST_IDLE:
            idle = sorted((each for each in self._accounts.values() if each not in busy), key=lambda each: each.served)
            for account in idle[: -MOST_IDLE // 2]:
                del self._accounts[account.tenant]


def fair_shares(wanted: Mapping[TenantAccount, float], whole: float) -> dict[TenantAccount, float]:
    """Each account's part of something that is there at any one time: by weight, and what one does not want is the
    others'. At least 1, where it wants that.

    Args:
        wanted: how much each can use.
    """
    shares: dict[TenantAccount, float] = {}
    left, weights = whole, sum(account.weight for account in wanted)
    # Those first that want least of what is theirs: what they leave is shared by those behind them.
    for account in sorted(wanted, key=lambda each: wanted[each] / each.weight):
        shares[account] = min(wanted[account], max(1.0, left * account.weight / max(account.weight, weights)))
        left = max(0.0, left - shares[account])
        weights -= account.weight
    return shares


def payer_headers(tenant: str, weight: float) -> dict[str, str]:
    """How a request says to an engine whose it is: among its ``trace_headers``, which engines do nothing with."""
    return {_TENANT: tenant, _WEIGHT: repr(weight)}


def payer_in(headers: Mapping[str, str] | None) -> tuple[str, float] | None:
    """Tenant and weight; None if it is nobody's."""
    if headers is None or _TENANT not in headers:
        return None
    return headers[_TENANT], float(headers[_WEIGHT])
