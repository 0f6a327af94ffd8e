"""What stands at both doors: a credential becomes a caller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from hycluster.access.caller import Caller
from hycluster.access.keyring import Keyring
from hycluster.errors import Unauthenticated
from hycluster.settings.access import Access

BEARER = "bearer"
# Longer than any key or token.
MAX_CREDENTIAL = 8192


class Guard:
    """Knows who may come in."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    async def caller(self, credential: str | None) -> Caller:
        """Who bears a credential.

        Raises:
            Unauthenticated: nobody.
            Unavailable: that can't be told now.
        """
        if not credential:
            raise Unauthenticated("API key: is missing; give it as 'Authorization: Bearer KEY'")
        if len(credential) > MAX_CREDENTIAL:
            raise Unauthenticated(f"API key: is longer than {MAX_CREDENTIAL} characters")
        return self._keyring.caller(credential)


def bearer(authorization: str) -> str | None:
    """The credential in what ``authorization`` says; None if it is of another kind."""
    kind, _, credential = authorization.partition(" ")
    return credential.strip() if kind.lower() == BEARER else None


@contextlib.asynccontextmanager
async def open_guard(settings: Access) -> AsyncIterator[Guard | None]:
    """The guard of these settings; None where whoever comes is let in.

    Raises:
        SettingsError: the database's URL is none.
    """
    if not settings.asks:
        yield None
        return
    # SQLAlchemy and alembic are imported by whom they serve.
    from hycluster.access.database import open_database

    keyring = Keyring(await asyncio.to_thread(open_database, settings), settings)
    await asyncio.to_thread(keyring.__enter__)
    try:
        yield Guard(keyring)
    finally:
        await asyncio.to_thread(keyring.__exit__, None, None, None)
