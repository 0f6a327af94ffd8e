"""The audit log, in the words of OpenAI's events."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from hycluster.admin_api.administration import Administration
from hycluster.admin_api.asked import MAX_LISTED
from hycluster.admin_api.objects import EVENTS, LINE, event_object
from hycluster.auth.admin_store import ChangesWanted
from hycluster.errors import InvalidInput
from hycluster.ingress.json_api import list_page

MOST_VALUES = 100
_Value = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Line = Annotated[str | None, Field(pattern=rf"^{LINE}[0-9]{{1,18}}$")]
_Time = Annotated[int | None, Field(ge=0, le=1 << 40)]


def _listed(name: str) -> Any:
    # Brackets are what OpenAI's clients write after the name of a list.
    return Field(default=[], alias=f"{name}[]", max_length=MOST_VALUES)


class AuditQuery(BaseModel):
    """Which events. A filter that is not known is refused: without it others would be listed than are asked for."""

    model_config = ConfigDict(extra="forbid")

    event_types: list[_Value] = _listed("event_types")
    project_ids: list[_Value] = _listed("project_ids")
    actor_ids: list[_Value] = _listed("actor_ids")
    actor_emails: list[_Value] = _listed("actor_emails")
    resource_ids: list[_Value] = _listed("resource_ids")
    gt: _Time = Field(default=None, alias="effective_at[gt]")
    gte: _Time = Field(default=None, alias="effective_at[gte]")
    lt: _Time = Field(default=None, alias="effective_at[lt]")
    lte: _Time = Field(default=None, alias="effective_at[lte]")
    tenant_only: bool = False
    after: _Line = None
    before: _Line = None
    limit: int = Field(default=20, ge=1, le=MAX_LISTED)

    @property
    def wanted(self) -> ChangesWanted:
        since = [each for each in (self.gte, None if self.gt is None else self.gt + 1) if each is not None]
        until = [each for each in (self.lte, None if self.lt is None else self.lt - 1) if each is not None]
        kinds = self.event_types
        actions = {*kinds, *(action for action, kind in EVENTS.items() if kind in kinds)}
        return ChangesWanted(
            actions=sorted(actions),
            actors=self.actor_ids,
            subjects=self.resource_ids,
            projects=self.project_ids,
            since=max(since, default=None),
            until=min(until, default=None),
        )


def audit_routes(administration: Administration) -> APIRouter:
    """``/audit_logs``, the newest first."""
    routes = APIRouter(prefix="/audit_logs")

    @routes.get("")
    async def list_audit_logs(asked: Annotated[AuditQuery, Query()]) -> Any:
        if asked.tenant_only:
            raise InvalidInput("tenant_only: true is not allowed; there are no events of that kind")
        after, before = (None if said is None else int(said.removeprefix(LINE)) for said in (asked.after, asked.before))
        forward = before is not None and after is None
        found = await administration.ask(
            lambda store: store.page_of_changes(asked.wanted, after=after, before=before, limit=asked.limit + 1)
        )
        # Nobody here has an address.
        events = [] if asked.actor_emails else [event_object(each) for each in found]
        if forward and len(events) > asked.limit:
            return list_page(events[1:], asked.limit) | {"has_more": True}
        return list_page(events, asked.limit)

    return routes
