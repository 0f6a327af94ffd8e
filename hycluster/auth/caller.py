"""Who calls: what a credential says of its bearer, and what the rest of the house asks of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from hycluster.errors import PermissionDenied, UnknownModel

Scope = Literal["batch", "admin", "priority", "adapters"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
# By so much clocks may differ where a token's time is looked at.
LEEWAY_S = 30


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever bears a credential.

    Attributes:
        key: the name of the API key, or the subject of the token.
        models: names of models and adapters that it may use; None: all.
        scopes: ``batch``: files, batches and requests at batch priority; ``admin``: all that is not a model's;
            ``priority``: requests that go before others, where they ask for it; ``adapters``: load and
            unload adapters of its project.
        expires_at: seconds since the epoch; None: never.
        key_id: the API key's id; empty for a token.
        weight: of its tenant, where tenants share an engine.
    """

    tenant: str
    project: str
    key: str
    models: frozenset[str] | None = None
    scopes: frozenset[str] = frozenset()
    expires_at: float | None = None
    key_id: str = ""
    weight: float = 1.0

    @property
    def owner(self) -> str:
        """What files, batches and responses are marked with: no name of either has a slash."""
        return f"{self.tenant}/{self.project}"

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def as_json(self) -> dict[str, Any]:
        """For a record of what is done for this caller later on."""
        models = None if self.models is None else sorted(self.models)
        return asdict(self) | {"models": models, "scopes": sorted(self.scopes)}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Self:
        models = None if told["models"] is None else frozenset(told["models"])
        return cls(**{**told, "models": models, "scopes": frozenset(told["scopes"])})


# None where nobody is asked who he is.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)


@contextmanager
def calling(caller: Caller | None) -> Iterator[None]:
    """What is done within, and what is begun within, is done for this caller."""
    token = current_caller.set(caller)
    try:
        yield
    finally:
        current_caller.reset(token)


def own_salt(asked: str | None) -> str | None:
    """What goes into the prefix cache's keys of what is done now: equal for no two projects, whatever they ask for.

    What is computed for one project is so never found by another, which by the time that its answer takes could tell
    what the other one has asked. There is no secret in it, so that all ingress processes have the same and the cache
    outlasts them: what a caller asks for is hashed with its owner before it, and nothing else reaches an engine.

    Args:
        asked: the caller's own ``cache_salt``, by which it may set apart its users. Where nobody is asked who he is, it
            is left as it is.
    """
    caller = current_caller.get()
    if caller is None:
        return asked
    # No owner has a line end, and without one there is no salt of the caller's.
    said = caller.owner if asked is None else f"{caller.owner}\n{asked}"
    return hashlib.sha256(said.encode()).hexdigest()


def check_model(name: str) -> None:
    """
    Raises:
        UnknownModel: the caller may not use it, which for him is as if it were not there.
    """
    caller = current_caller.get()
    if caller is not None and caller.models is not None and name not in caller.models:
        raise UnknownModel(name, sorted(caller.models))


def check_scope(scope: Scope, what: str) -> None:
    """
    Raises:
        PermissionDenied: the caller has not this scope.
    """
    caller = current_caller.get()
    if caller is not None and scope not in caller.scopes:
        raise PermissionDenied(f"{what}: needs the scope {scope!r}, which this key does not have")


def has_scope(scope: Scope) -> bool:
    """Whether the caller has it, or nobody is asked who he is."""
    caller = current_caller.get()
    return caller is None or scope in caller.scopes


def usable(names: Iterable[str]) -> list[str]:
    """Those models of which the caller may hear."""
    caller = current_caller.get()
    return [name for name in names if caller is None or caller.may_use(name)]


# A caller as a record of files, batches and responses has it; None where nobody was asked who he is.
Recorded = dict[str, Any] | None


def caller_now() -> Recorded:
    """For whom it is that is done now."""
    caller = current_caller.get()
    return None if caller is None else caller.as_json()


def recorded(record: Recorded) -> Caller | None:
    """For whom it was."""
    return None if record is None else Caller.from_json(record)


def is_own(record: Recorded) -> bool:
    """Whether the caller may know of what was done for the one on record: it is of his project."""
    caller, other = current_caller.get(), recorded(record)
    return caller is None or (other is not None and other.owner == caller.owner)
