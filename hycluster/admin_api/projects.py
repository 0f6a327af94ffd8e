"""Projects, their service accounts, and their keys."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from hycluster.admin_api.administration import Administration, manager
from hycluster.admin_api.asked import (
    ALL_OF_A_PROJECT,
    After,
    ChangedProject,
    ChangedServiceAccount,
    Limit,
    NewAccountKey,
    NewProject,
    NewServiceAccount,
    allowed_by,
    ends_at,
)
from hycluster.admin_api.objects import account_object, key_object, new_key_object, project_object
from hycluster.auth.admin_store import AdminStore
from hycluster.errors import InvalidInput
from hycluster.ingress.json_api import json_body, list_page
from hycluster.settings.read import validate


def project_routes(administration: Administration) -> APIRouter:
    """``/projects`` itself."""
    routes, ask = APIRouter(prefix="/projects"), administration.ask

    @routes.get("")
    async def list_projects(after: After = None, limit: Limit = 20, include_archived: bool = False) -> Any:
        found = await ask(lambda store: store.page_of_projects(after, limit + 1, archived=include_archived))
        return list_page([project_object(project) for project in found], limit)

    @routes.post("")
    async def create_project(request: Request) -> Any:
        asked, tenant = validate(NewProject, await json_body(request), "body"), manager().tenant
        return project_object(await ask(lambda store: store.add_project(tenant, asked.name)))

    @routes.get("/{project_id}")
    async def retrieve_project(project_id: str) -> Any:
        return project_object(await ask(lambda store: store.project_by_id(project_id)))

    @routes.post("/{project_id}")
    async def modify_project(project_id: str, request: Request) -> Any:
        asked = validate(ChangedProject, await json_body(request), "body")
        return project_object(await ask(lambda store: store.rename_project(project_id, asked.name)))

    @routes.post("/{project_id}/archive")
    async def archive_project(project_id: str) -> Any:
        return project_object(await ask(lambda store: store.archive_by_id(project_id)))

    return routes


def account_routes(administration: Administration) -> APIRouter:
    """A project's ``/service_accounts``, by which its keys are made."""
    routes, ask = APIRouter(prefix="/projects/{project_id}/service_accounts"), administration.ask

    @routes.get("")
    async def list_service_accounts(project_id: str, after: After = None, limit: Limit = 20) -> Any:
        found = await ask(lambda store: store.page_of_accounts(project_id, after, limit + 1))
        return list_page([account_object(account) for account in found], limit)

    @routes.post("")
    async def create_service_account(project_id: str, request: Request) -> Any:
        asked = validate(NewServiceAccount, await json_body(request), "body")
        with_key = not asked.create_service_account_only
        if not with_key and asked.expires_in_seconds is not None:
            raise InvalidInput("expires_in_seconds: is not allowed with 'create_service_account_only'")
        account, made = await ask(
            lambda store: store.add_account(
                project_id, asked.name, with_key=with_key, scopes=ALL_OF_A_PROJECT,
                expires_at=ends_at(asked.expires_in_seconds),
            )
        )  # fmt: skip
        return account_object(account) | {"api_key": None if made is None else new_key_object(*made)}

    @routes.get("/{account_id}")
    async def retrieve_service_account(project_id: str, account_id: str) -> Any:
        return account_object(await ask(lambda store: store.account(project_id, account_id)))

    @routes.post("/{account_id}")
    async def modify_service_account(project_id: str, account_id: str, request: Request) -> Any:
        asked = validate(ChangedServiceAccount, await json_body(request), "body")
        return account_object(await ask(lambda store: store.rename_account(project_id, account_id, asked.name)))

    @routes.delete("/{account_id}")
    async def delete_service_account(project_id: str, account_id: str) -> Any:
        await ask(lambda store: store.delete_account(project_id, account_id))
        return {"id": account_id, "object": "organization.project.service_account.deleted", "deleted": True}

    @routes.post("/{account_id}/api_keys")
    async def create_service_account_key(project_id: str, account_id: str, request: Request) -> Any:
        asked = validate(NewAccountKey, await json_body(request, may_be_empty=True), "body")
        scopes, models = allowed_by(asked.scopes)
        made = await ask(
            lambda store: store.add_key(
                store.account(project_id, account_id), asked.name, models=models, scopes=scopes,
                expires_at=ends_at(asked.expires_in_seconds),
            )
        )  # fmt: skip
        return new_key_object(*made)

    return routes


def key_routes(administration: Administration) -> APIRouter:
    """A project's ``/api_keys``, also those that ``hycluster keys`` has made."""
    routes, ask = APIRouter(prefix="/projects/{project_id}/api_keys"), administration.ask

    @routes.get("")
    async def list_api_keys(project_id: str, after: After = None, limit: Limit = 20) -> Any:
        def look(store: AdminStore) -> list[dict[str, Any]]:
            keys = store.page_of_keys(project_id, after, limit + 1)
            accounts = store.accounts(key.account_id for key in keys if key.account_id is not None)
            return [key_object(key, accounts.get(key.account_id or "")) for key in keys]

        return list_page(await ask(look), limit)

    @routes.get("/{key_id}")
    async def retrieve_api_key(project_id: str, key_id: str) -> Any:
        def look(store: AdminStore) -> dict[str, Any]:
            key = store.key_of(project_id, key_id)
            accounts = store.accounts([key.account_id] if key.account_id is not None else [])
            return key_object(key, accounts.get(key.account_id or ""))

        return await ask(look)

    @routes.delete("/{key_id}")
    async def delete_api_key(project_id: str, key_id: str) -> Any:
        await ask(lambda store: store.revoke_key_of(project_id, key_id))
        return {"id": key_id, "object": "organization.project.api_key.deleted", "deleted": True}

    return routes
