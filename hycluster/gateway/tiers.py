"""Service tiers, as OpenAI has them: what a request asks for by ``service_tier``, and what it gets.

``flex`` goes with bulk work, behind all online requests; anybody may wait longer than he has to. ``priority`` goes
before all others, for callers with the scope of that name; for whoever has not it is as ``default``, and the answer
says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

from hycluster.auth.caller import current_caller
from hycluster.core import Priority
from hycluster.errors import InvalidInput, shown

ServiceTier = Literal["default", "flex", "priority"]
# ``auto`` leaves it to the service; ``scale`` is what one buys of OpenAI.
ASKED = ("auto", *get_args(ServiceTier), "scale")
# Before what callers may say themselves.
FIRST = int(Priority.ONLINE) - 1

_current: ContextVar[ServiceTier] = ContextVar("current_tier", default="default")
_for_batch: ContextVar[bool] = ContextVar("for_batch", default=False)


def tier_for(asked: Any) -> ServiceTier:
    """What the caller gets.

    Raises:
        InvalidInput: there is no such tier.
    """
    if asked not in ASKED:
        raise InvalidInput(f"service_tier: {shown(asked)} is not allowed; must be one of {', '.join(ASKED)}")
    caller = current_caller.get()
    if asked == "priority" and caller is not None and "priority" in caller.scopes:
        return "priority"
    return "flex" if asked == "flex" else "default"


@contextmanager
def served_as(tier: ServiceTier) -> Iterator[None]:
    """What is asked of models within is of this tier."""
    token = _current.set(tier)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def for_batch() -> Iterator[None]:
    """What is asked of models within is a batch's, whatever tier its lines ask for."""
    token = _for_batch.set(True)
    try:
        yield
    finally:
        _for_batch.reset(token)


def is_bulk_now() -> bool:
    """What is asked of models now goes behind all online requests, as far as can be told before its priority is."""
    return _for_batch.get() or _current.get() == "flex"


def placed(priority: int) -> int:
    """Where in the engines' queues a request goes that asks for this priority; never before its place by both."""
    tier = _current.get()
    if tier == "flex":
        return max(priority, int(Priority.BATCH))
    return FIRST if tier == "priority" and priority == Priority.ONLINE else priority
