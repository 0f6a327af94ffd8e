"""Keys with the scope ``admin``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from hycluster.admin_api.administration import Administration, manager
from hycluster.admin_api.asked import After, Limit, NewAdminKey, ends_at
from hycluster.admin_api.objects import admin_key_object
from hycluster.auth.admin_store import AdminStore, Order, as_name
from hycluster.auth.store import ApiKey
from hycluster.ingress.json_api import json_body, list_page
from hycluster.settings.read import validate


def admin_key_routes(administration: Administration) -> APIRouter:
    """``/admin_api_keys``. One that is made here is of its maker's project, and may use no model."""
    routes, ask = APIRouter(prefix="/admin_api_keys"), administration.ask

    @routes.get("")
    async def list_admin_keys(after: After = None, limit: Limit = 20, order: Order = "asc") -> Any:
        found = await ask(lambda store: store.page_of_keys(None, after, limit + 1, order))
        return list_page([admin_key_object(key) for key in found], limit)

    @routes.post("")
    async def create_admin_key(request: Request) -> Any:
        asked, maker = validate(NewAdminKey, await json_body(request), "body"), manager()

        def make(store: AdminStore) -> tuple[ApiKey, str]:
            project = store.project_or_new(maker.tenant, maker.project)
            name, ends = as_name(asked.name, "admin"), ends_at(asked.expires_in_seconds)
            return store.create_key(project, name, models=(), scopes=("admin",), expires_at=ends, title=asked.name)

        return admin_key_object(*await ask(make))

    @routes.get("/{key_id}")
    async def retrieve_admin_key(key_id: str) -> Any:
        return admin_key_object(await ask(lambda store: store.key_of(None, key_id)))

    @routes.delete("/{key_id}")
    async def delete_admin_key(key_id: str) -> Any:
        await ask(lambda store: store.revoke_key_of(None, key_id))
        return {"id": key_id, "object": "organization.admin_api_key.deleted", "deleted": True}

    return routes
