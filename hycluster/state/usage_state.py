"""Who has had how much of late, and how near limits are, as the page tells it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from hycluster.auth.limits import BILLION, Limit
from hycluster.auth.store import Spent
from hycluster.ledger.usage import UsageSum
from hycluster.limits.book import PERIODS, Name

HOUR_S, DAY_S = 3600, 86400
# Owners and limits that are told one by one.
MOST = 50


@dataclass(frozen=True, slots=True)
class OwnerUsage:
    """What a project has had, or all that are not told one by one (``others``: how many).

    Attributes:
        cached_tokens: those of ``input_tokens`` that were in the KV cache.
        cost: in the currency of the settings.
    """

    tenant: str
    project: str
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost: Decimal
    others: int = 0


@dataclass(frozen=True, slots=True)
class SpanUsage:
    """A span of time until now.

    Attributes:
        owners: by cost, then by tokens, the most first.
        total: of all.
    """

    span_s: int
    owners: tuple[OwnerUsage, ...]
    total: OwnerUsage


@dataclass(frozen=True, slots=True)
class LimitUsage:
    """One limit of somebody's.

    Attributes:
        of: ``key``, ``project`` or ``tenant``.
        whose: its name.
        model: of requests for this model alone; empty: of all.
        kind: as ``hycluster limits`` names it.
        limit, used: in its unit; of a budget in the currency. By the minute, what was used within the last one.
        share: of the limit that is used; above 1 where a request has used more than was expected.
    """

    of: str
    whose: str
    model: str
    kind: str
    limit: Decimal
    used: Decimal
    share: float


@dataclass(frozen=True, slots=True)
class UsageState:
    """All of it, at one moment.

    Attributes:
        at: seconds since the epoch; 0: it is not read yet.
        problems: in words, what could not be read.
        limits: the nearest to being reached first; ``limits_left_out`` more are not told.
    """

    at: float
    currency: str
    spans: tuple[SpanUsage, ...] = ()
    limits: tuple[LimitUsage, ...] = ()
    limits_left_out: int = 0
    problems: tuple[str, ...] = ()


def span_usage(span_s: int, sums: Iterable[UsageSum]) -> SpanUsage:
    """Of sums by tenant and project."""
    owners = [
        OwnerUsage(
            each.group["tenant"], each.group["project"], each.requests, each.input_tokens, each.cached_tokens,
            each.output_tokens, each.cost,
        )
        for each in sums
    ]  # fmt: skip
    owners.sort(key=lambda one: (-one.cost, -one.input_tokens - one.output_tokens, one.tenant, one.project))
    told = owners if len(owners) <= MOST else [*owners[: MOST - 1], _together(owners[MOST - 1 :])]
    return SpanUsage(span_s, tuple(told), _together(owners))


def _together(owners: list[OwnerUsage]) -> OwnerUsage:
    return OwnerUsage(
        "", "",
        sum(one.requests for one in owners),
        sum(one.input_tokens for one in owners),
        sum(one.cached_tokens for one in owners),
        sum(one.output_tokens for one in owners),
        sum((one.cost for one in owners), Decimal(0)),
        len(owners),
    )  # fmt: skip


def periods(now: float) -> dict[str, str]:
    """By kinds of limits, the day or the month that it is (UTC)."""
    then = datetime.fromtimestamp(now, UTC)
    return {kind: then.strftime("%Y-%m" if kind == "budget_per_month" else "%Y-%m-%d") for kind in PERIODS}


def limits_usage(
    limits: Iterable[Limit],
    used: Mapping[Name, int],
    spent: Mapping[Spent, int],
    key_name: Callable[[str], str],
    now: float,
) -> list[LimitUsage]:
    """How near each is, the nearest first.

    Args:
        used: of limits by the minute and of concurrent requests.
        spent: of those by the day and by the month.
        key_name: of a key's id.
    """
    period, found = periods(now), []
    for limit in limits:
        whose = f"{limit.tenant}/{limit.project}" if limit.project else limit.tenant
        if limit.key_id:
            whose = f"{key_name(limit.key_id)} {limit.key_id}".strip()
        for kind, value in limit.values.items():
            name = limit.subject, kind
            amount = spent.get((*name, period[kind]), 0) if kind in period else used.get(name, 0)
            unit = Decimal(BILLION if kind == "budget_per_month" else 1)
            found.append(
                LimitUsage(limit.of, whose, limit.model or "", kind, value / unit, amount / unit, amount / value)
            )
    return sorted(found, key=lambda each: (-each.share, each.of, each.whose, each.model, each.kind))
