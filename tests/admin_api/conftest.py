from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from sqlalchemy import Engine
from starlette.responses import JSONResponse

from hycluster.admin_api.app import open_administration, with_admin
from hycluster.auth.database import open_database
from hycluster.auth.guard import Guard
from hycluster.auth.keyring import Keyring
from hycluster.auth.store import KeyStore
from hycluster.ingress.forms import in_form
from hycluster.ingress.guarded import Guarded
from hycluster.ledger.books import Books
from hycluster.settings.auth import Auth
from hycluster.settings.ingress import Http
from hycluster.storage import locate

# The same databases.
from tests.auth.conftest import engine, server, settings

__all__ = ["engine", "server", "settings"]


@dataclass
class Admin:
    """An ingress's door and the admin API behind it, on a socket.

    Attributes:
        books: the usage ledger.
        root: of tenant ``acme`` and its project ``ops``, with the scope ``admin``.
    """

    url: str
    root: str
    keyring: Keyring
    store: KeyStore
    books: Books

    def client(self, key: str | None = None) -> openai.AsyncOpenAI:
        # As whoever administrates has it: its admin key alone.
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", admin_api_key=key or self.root, max_retries=0
        )

    def http(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key or self.root}"}
        return httpx.AsyncClient(base_url=f"{self.url}/v1/organization", headers=headers, timeout=30)

    def lets_in(self, key: str) -> bool:
        """As of now."""
        self.keyring.look()
        try:
            self.keyring.caller(key)
        except Exception:
            return False
        return True


@asynccontextmanager
async def listening(app: object) -> AsyncIterator[str]:
    """Where an app answers, on loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, ws="none"))  # type: ignore[arg-type]
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def admin(settings: Auth, engine: Engine, tmp_path: Path) -> AsyncIterator[Admin]:
    store = KeyStore(engine, "cli root")
    ops = store.create_project("acme", "ops")
    _, root = store.create_key(ops, "root", scopes=["admin"])
    books = Books(locate(str(tmp_path / "ledger"), "ledger.store").writable())
    keyring = Keyring(open_database(settings), settings)
    async with open_administration(settings, books) as administration:
        behind = with_admin(administration, Http(), JSONResponse({"app": "other"}))
        with keyring:
            async with listening(in_form(Guarded(behind, Guard(keyring)), [])) as url:
                yield Admin(url, root, keyring, store, books)
