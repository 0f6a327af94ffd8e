"""``/v1/organization`` at the HTTP ingress. Errors are in OpenAI's form.

Who comes here has the scope ``admin``: the ingress's door lets nobody else through (``hycluster/ingress/guarded.py``).
Where nobody is asked who he is, or no keys are kept, nothing is here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.errors import NotFound
from hycluster.ingress.body import BodyLimit
from hycluster.ingress.errors import answer_error
from hycluster.ingress.guarded import ORGANIZATION
from hycluster.ingress.json_api import MAX_JSON_BYTES
from hycluster.ingress.schema import WithSchema
from hycluster.settings.auth import Auth
from hycluster.settings.ingress import Http

if TYPE_CHECKING:
    from hycluster.admin_api.administration import Administration
    from hycluster.ledger.books import Books


@contextlib.asynccontextmanager
async def open_administration(auth: Auth, books: Books | None = None) -> AsyncIterator[Administration | None]:
    """What the admin API works with; None where there are no keys. Connects nowhere yet.

    Args:
        books: the usage ledger; None where it is off.

    Raises:
        SettingsError: the database's URL is none.
    """
    if not (auth.enabled and auth.keys):
        yield None
        return
    # Where there are no keys, nothing of a database is imported.
    from hycluster.admin_api.administration import Administration
    from hycluster.auth.database import open_database

    administration = Administration(open_database(auth), books, auth.currency)
    try:
        yield administration
    finally:
        await asyncio.to_thread(administration.close)


def with_admin(administration: Administration | None, http: Http, others: ASGIApp) -> ASGIApp:
    """The admin API beside an HTTP ingress's other routes."""
    if administration is None:
        return BesideOthers(_not_here, others)
    from hycluster.admin_api.routes import admin_api

    api = admin_api(administration)
    limit = BodyLimit(api, MAX_JSON_BYTES, stall_s=http.stalled_client_timeout_s)
    return BesideOthers(limit, WithSchema(others, api))


class BesideOthers:
    """ASGI app: what is below ``/v1/organization`` goes to one app, all else to another."""

    def __init__(self, admin: ASGIApp, others: ASGIApp) -> None:
        self._admin = admin
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        ours = scope["type"] == "http" and (path == ORGANIZATION or path.startswith(f"{ORGANIZATION}/"))
        await (self._admin if ours else self._others)(scope, receive, send)


async def _not_here(scope: Scope, receive: Receive, send: Send) -> None:
    error = NotFound(f"{ORGANIZATION}: is here only with 'auth.enabled' and 'auth.keys' in the settings")
    await (await answer_error(None, error))(scope, receive, send)
