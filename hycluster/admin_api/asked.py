"""Bodies of the admin API, and what of a query its lists have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import Query
from pydantic import Field, StringConstraints

from hycluster.auth.caller import SCOPES, Scope
from hycluster.auth.tokens import ALL_MODELS, MODEL
from hycluster.errors import InvalidInput, shown
from hycluster.settings.base import Strict

MAX_LISTED = 100
MAX_SCOPES = 100

After = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]

Title = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$"),
]
# Up to a hundred years.
LastsS = Annotated[int, Field(ge=1, le=100 * 365 * 86400)]
ScopeOrModel = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]


class NewProject(Strict):
    """``geography`` and the like are not: what is asked for and can't be had is refused."""

    name: Title


class ChangedProject(Strict):
    name: Title


class NewServiceAccount(Strict):
    name: Title
    create_service_account_only: bool | None = None
    expires_in_seconds: LastsS | None = None


class ChangedServiceAccount(Strict):
    name: Title


class NewAccountKey(Strict):
    name: Title | None = None
    scopes: Annotated[list[ScopeOrModel], Field(max_length=MAX_SCOPES)] | None = None
    expires_in_seconds: LastsS | None = None


class NewAdminKey(Strict):
    name: Title
    expires_in_seconds: LastsS | None = None


def ends_at(lasts_s: int | None) -> int | None:
    """In seconds since the epoch."""
    return None if lasts_s is None else int(time.time()) + lasts_s


# What OpenAI calls all permissions: all that is of the key's project.
ALL_OF_A_PROJECT: tuple[Scope, ...] = ("batch",)
# An entitlement that somebody gives is not among all permissions.
OF_A_PROJECT: tuple[Scope, ...] = (*ALL_OF_A_PROJECT, "priority", "adapters")


def allowed_by(said: Sequence[str] | None) -> tuple[tuple[Scope, ...], list[str] | None]:
    """The scopes and the models of ``scopes`` in a body: as in a token, but none are all of a project.

    Raises:
        InvalidInput: one is none.
    """
    if not said:
        return ALL_OF_A_PROJECT, None
    models = [scope.removeprefix(MODEL) for scope in said if scope.startswith(MODEL)]
    rest = [scope for scope in said if not scope.startswith(MODEL)]
    for scope in rest:
        if scope not in OF_A_PROJECT:
            allowed = ", ".join(map(repr, (*OF_A_PROJECT, f"{MODEL}NAME", ALL_MODELS)))
            raise InvalidInput(f"scopes: {shown(scope)} is not allowed; must be of {allowed}")
    return tuple(scope for scope in SCOPES if scope in rest), None if ALL_MODELS in said else models
