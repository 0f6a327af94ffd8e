"""Usage and limits in words."""

from __future__ import annotations

from decimal import Decimal

from hycluster.limits.limiter import UNITS
from hycluster.state.usage_state import LimitUsage, OwnerUsage
from hycluster.state.words import count


def money(amount: Decimal, currency: str) -> str:
    """``12,340.50 USD``; of small amounts two figures: ``0.0012 USD``."""
    digits = 2 if amount == 0 or amount >= Decimal("0.995") else 1 - amount.adjusted()
    return f"{amount:,.{digits}f} {currency.upper()}"


def named_owner(usage: OwnerUsage) -> str:
    """A project with its tenant; where nobody is asked who he is, all are one."""
    if usage.others:
        return f"{usage.others} others"
    return f"{usage.tenant}/{usage.project}" if usage.tenant or usage.project else "whoever comes"


def limit_of(limit: LimitUsage, currency: str) -> str:
    """What is used of it: ``420 of 600 requests a minute``."""
    if limit.kind == "budget_per_month":
        return f"{money(limit.used, currency)} of {money(limit.limit, currency)} a month"
    return f"{count(float(limit.used))} of {count(float(limit.limit))} {UNITS[limit.kind]}"
