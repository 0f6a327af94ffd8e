"""Limits as the database has them: how much a key, a project or a tenant may use, of all models or of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from sqlalchemy import Connection, select

from hycluster.auth import tables
from hycluster.auth.caller import Caller

Kind = Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent_requests", "budget_per_month"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# A budget is counted in billionths of the currency.
BILLION = 10**9


@dataclass(frozen=True)
class Limit:
    """Of a key, if ``key_id`` is one, else of a project, if there is one, else of the tenant; None is no limit.

    Attributes:
        model: of requests for this model or adapter alone; None: of all.
        budget_per_month: in billionths of the currency.
    """

    tenant: str
    project: str | None = None
    key_id: str | None = None
    model: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None
    budget_per_month: int | None = None

    @property
    def of(self) -> str:
        """``key``, ``project`` or ``tenant``."""
        return "key" if self.key_id else "project" if self.project else "tenant"

    @cached_property
    def subject(self) -> str:
        """Whose it is, in one word; no two have the same."""
        whose = self.key_id or (f"{self.tenant}/{self.project}" if self.project else self.tenant)
        return f"{self.of}:{whose}" + (f"|{self.model}" if self.model else "")

    @cached_property
    def values(self) -> dict[str, int]:
        """What is limited."""
        return {kind: value for kind in KINDS if (value := getattr(self, kind)) is not None}

    def concerns(self, caller: Caller, model: str) -> bool:
        """Whether a request of this caller's for this model or adapter counts."""
        if self.model is not None and self.model != model:
            return False
        if self.key_id is not None:
            return self.key_id == caller.key_id
        return self.tenant == caller.tenant and self.project in (None, caller.project)


def read_limits(connection: Connection) -> tuple[Limit, ...]:
    """All of them."""
    columns = tables.limits.c
    rows = connection.execute(select(tables.limits).order_by(columns.subject))
    names = ("tenant", "project", "key_id", "model", *KINDS)
    return tuple(Limit(**{name: getattr(row, name) for name in names}) for row in rows)
