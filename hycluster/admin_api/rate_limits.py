"""Limits of a project, by model, as far as OpenAI's admin API has words for them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from hycluster.admin_api.administration import Administration
from hycluster.auth.admin_store import AdminStore
from hycluster.auth.limits import Limit
from hycluster.auth.store import check_open
from hycluster.errors import InvalidInput, NotFound, shown
from hycluster.ingress.json_api import json_body, list_page
from hycluster.settings.base import NAME_PATTERN, Strict
from hycluster.settings.read import validate

# Of all models together; with a dash and a name, of that model or adapter alone.
ALL = "rl"
MAX_MODEL, MAX_LISTED_LIMITS = 200, 100
_MODEL = re.compile(NAME_PATTERN, re.ASCII)

_Cursor = Annotated[str | None, Query(max_length=MAX_MODEL + len(ALL) + 1)]
_Amount = Annotated[int, Field(ge=1, lt=1 << 62)]


class ChangedRateLimit(Strict):
    """What is given is set, null takes it away; what is not given stays."""

    max_requests_per_1_minute: _Amount | None = None
    max_tokens_per_1_minute: _Amount | None = None


_FIELDS = {"max_requests_per_1_minute": "requests_per_minute", "max_tokens_per_1_minute": "tokens_per_minute"}


def rate_limit_routes(administration: Administration) -> APIRouter:
    """A project's ``/rate_limits``."""
    routes, ask = APIRouter(prefix="/projects/{project_id}/rate_limits"), administration.ask

    @routes.get("")
    async def list_rate_limits(
        project_id: str,
        after: _Cursor = None,
        before: _Cursor = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED_LIMITS)] = MAX_LISTED_LIMITS,
    ) -> Any:
        found = await ask(lambda store: sorted(_of_project(store, project_id).items()))
        found = [(name, each) for name, each in found if name > (after or "") and (before is None or name < before)]
        if before is not None and after is None and len(found) > limit:
            return list_page([_object(each) for _, each in found[-limit:]], limit) | {"has_more": True}
        return list_page([_object(each) for _, each in found[: limit + 1]], limit)

    # A model's name may have slashes.
    @routes.post("/{rate_limit_id:path}")
    async def modify_rate_limit(project_id: str, rate_limit_id: str, request: Request) -> Any:
        body = await json_body(request)
        asked = validate(ChangedRateLimit, body, "body")
        if not body:
            raise InvalidInput(f"body: must have at least one of {', '.join(_FIELDS)}")
        changed = {ours: getattr(asked, theirs) for theirs, ours in _FIELDS.items() if theirs in body}

        def change(store: AdminStore) -> Limit:
            project = store.project_by_id(project_id)
            check_open(project)
            whose = Limit(project.tenant, project.name, None, _model_of(rate_limit_id))
            before = _of_project(store, project_id).get(rate_limit_id)
            after = replace(before or whose, **changed)
            if after.values:
                store.set_limit(after)
            elif before is not None:
                store.remove_limit(before.subject)
            return after

        return _object(await ask(change))

    return routes


def _of_project(store: AdminStore, project_id: str) -> dict[str, Limit]:
    project = store.project_by_id(project_id)
    owner = project.tenant, project.name, None
    found = [limit for limit in store.limits() if (limit.tenant, limit.project, limit.key_id) == owner]
    return {_id_of(limit): limit for limit in found}


def _id_of(limit: Limit) -> str:
    return ALL if limit.model is None else f"{ALL}-{limit.model}"


def _model_of(rate_limit_id: str) -> str | None:
    if rate_limit_id == ALL:
        return None
    prefix, dash, model = rate_limit_id.partition("-")
    if prefix != ALL or not dash or len(model) > MAX_MODEL or not _MODEL.fullmatch(model):
        raise NotFound(f"rate_limit_id: there is no rate limit {shown(rate_limit_id)}; they are called rl, or rl-MODEL")
    return model


def _object(limit: Limit) -> dict[str, Any]:
    # Null is no limit.
    figures = {theirs: getattr(limit, ours) for theirs, ours in _FIELDS.items()}
    return {"object": "project.rate_limit", "id": _id_of(limit), "model": limit.model or "*", **figures}
