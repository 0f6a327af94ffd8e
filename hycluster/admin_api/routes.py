"""All routes of the admin API."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from hycluster.admin_api.admin_keys import admin_key_routes
from hycluster.admin_api.administration import Administration
from hycluster.admin_api.audit_logs import audit_routes
from hycluster.admin_api.projects import account_routes, key_routes, project_routes
from hycluster.admin_api.rate_limits import rate_limit_routes
from hycluster.admin_api.usage import usage_routes
from hycluster.ingress.guarded import ORGANIZATION
from hycluster.ingress.json_api import json_api


def admin_api(administration: Administration) -> FastAPI:
    """The app."""
    routes = APIRouter(prefix=ORGANIZATION)
    for made in (
        project_routes,
        account_routes,
        key_routes,
        rate_limit_routes,
        admin_key_routes,
        audit_routes,
        usage_routes,
    ):
        routes.include_router(made(administration))
    app = json_api()
    app.include_router(routes)
    return app
