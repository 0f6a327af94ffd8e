"""What the database has, as OpenAI's admin API shows it.

``tenant`` and ``project`` are ours: what files, batches and responses are marked with, and what ``hycluster keys``
calls a project.
"""

from __future__ import annotations

from typing import Any

from hycluster.auth.admin_store import LoggedChange, ServiceAccount
from hycluster.auth.api_key import PREFIX
from hycluster.auth.store import ApiKey, Project

# Nothing of a key is kept that could be shown.
REDACTED = f"{PREFIX}***"
LINE = "audit_log-"

# What the log calls a change, as OpenAI's events are called.
EVENTS = {
    "key.created": "api_key.created",
    "key.updated": "api_key.updated",
    "key.expires": "api_key.updated",
    "key.revoked": "api_key.deleted",
    "limit.set": "rate_limit.updated",
    "limit.removed": "rate_limit.deleted",
}


def project_object(project: Project) -> dict[str, Any]:
    return {
        "id": project.id,
        "object": "organization.project",
        "name": called(project),
        "created_at": project.created_at,
        "archived_at": project.archived_at,
        "status": "active" if project.archived_at is None else "archived",
        "tenant": project.tenant,
        "project": project.name,
    }


def account_object(account: ServiceAccount) -> dict[str, Any]:
    return {
        "id": account.id,
        "object": "organization.project.service_account",
        "name": account.title,
        "role": "member",
        "created_at": account.created_at,
    }


def new_key_object(key: ApiKey, secret: str) -> dict[str, Any]:
    """The one time that a key is shown."""
    return {
        "id": key.id,
        "object": "organization.project.service_account.api_key",
        "name": called(key),
        "value": secret,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
    }


def key_object(key: ApiKey, account: ServiceAccount | None) -> dict[str, Any]:
    """A key that ``hycluster keys`` has made is nobody's but the project's."""
    owner = None
    if account is not None:
        owner = {name: value for name, value in account_object(account).items() if name != "object"}
    return {
        "id": key.id,
        "object": "organization.project.api_key",
        "name": called(key),
        "redacted_value": REDACTED,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": None,
        "owner": {"type": "service_account", "service_account": owner},
        "owner_project_access": "active",
        "scopes": scopes_of(key),
    }


def admin_key_object(key: ApiKey, secret: str | None = None) -> dict[str, Any]:
    """With ``value``, the key itself, if it has just been made."""
    shown = {
        "id": key.id,
        "object": "organization.admin_api_key",
        "name": called(key),
        "redacted_value": REDACTED,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": None,
        "owner": {
            "type": "service_account", "object": "organization.service_account", "id": f"{key.tenant}/{key.project}",
            "name": f"{key.tenant}/{key.project}", "created_at": key.created_at, "role": "owner",
        },
        "tenant": key.tenant,
        "project": key.project,
    }  # fmt: skip
    return shown if secret is None else shown | {"value": secret}


def scopes_of(key: ApiKey) -> list[str]:
    """In the words of a token's: what it may do, and which models it may use."""
    return [*key.scopes, *(["model:*"] if key.models is None else [f"model:{name}" for name in key.models])]


def called(thing: Project | ApiKey) -> str:
    return thing.title if thing.title is not None else thing.name


def event_object(logged: LoggedChange) -> dict[str, Any]:
    change, project = logged.change, logged.project
    kind = EVENTS.get(change.action, change.action)
    return {
        "id": f"{LINE}{logged.number}",
        "object": "organization.audit_log",
        "type": kind,
        "effective_at": change.at,
        "project": None if project is None else {"id": project.id, "name": called(project)},
        "actor": _actor(change.actor),
        kind: {"id": change.subject} | _details(change.action, change.at, change.detail),
        "detail": change.detail,
    }


def _actor(actor: str) -> dict[str, Any]:
    kind, _, _ = actor.partition(" ")
    if kind in ("key", "token"):
        return {"type": "api_key", "api_key": {"type": "service_account", "id": actor}}
    # A command, at a terminal.
    return {"type": "session", "session": {"user": {"id": actor}}}


def _details(action: str, at: int, told: dict[str, Any]) -> dict[str, Any]:
    if action == "project.created":
        return {"data": {"name": told["project"], "title": told.get("title", told["project"])}}
    if action in ("project.updated", "service_account.updated"):
        return {"changes_requested": told}
    if action == "service_account.created":
        return {"data": {"role": "member"}}
    if action == "key.created":
        return {"data": {"scopes": list(told["scopes"])}}
    if action == "limit.set":
        names = {"requests_per_minute": "max_requests_per_1_minute", "tokens_per_minute": "max_tokens_per_1_minute"}
        return {"changes_requested": {names[kind]: value for kind, value in told.items() if kind in names}}
    if action in ("key.updated", "key.expires"):
        changes = {"scopes": told["scopes"]} if "scopes" in told else {}
        if told.get("expires_at") is not None:
            changes["expires_in_seconds"] = told["expires_at"] - at
        return {"changes_requested": changes}
    return {}
