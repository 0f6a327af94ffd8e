"""What stands at both doors: a credential becomes a caller."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hycluster.auth.caller import LEEWAY_S, Caller
from hycluster.auth.certificate import PeerCertificate
from hycluster.errors import Unauthenticated
from hycluster.settings.auth import Auth, ClientCertificates

if TYPE_CHECKING:
    from hycluster.auth.keyring import Keyring
    from hycluster.auth.tokens import Tokens

BEARER = "bearer"
# Longer than any key or token.
MAX_CREDENTIAL = 8192


class Guard:
    """Knows who may come in.

    Args:
        weights: of tenants, where these share an engine; all others have 1.
        certificates: what clients' certificates count for; None where nobody is asked for one.

    Attributes:
        keyring: which knows keys and limits; None where only tokens let in.
    """

    def __init__(
        self,
        keyring: Keyring | None,
        tokens: Tokens | None = None,
        weights: Mapping[str, float] | None = None,
        certificates: ClientCertificates | None = None,
    ) -> None:
        self.keyring = keyring
        self.certificates = certificates
        self._tokens = tokens
        self._weights = weights or {}

    async def caller(self, credential: str | None, certificate: PeerCertificate | None = None) -> Caller:
        """Who bears a credential, or without one shows a certificate.

        Raises:
            Unauthenticated: nobody.
            Unavailable: that can't be told now.
        """
        if certificate is None and self.certificates is not None and self.certificates.required:
            raise Unauthenticated("certificate: is missing; nobody is let in without one")
        # In a connection that is open for long it may end.
        if certificate is not None and certificate.expires_at <= time.time():
            raise Unauthenticated("certificate: has expired")
        if not credential and certificate is not None and self.keyring is not None:
            return self._weighed(self.keyring.shows(certificate))
        if not credential:
            raise Unauthenticated("API key: is missing; give it as 'Authorization: Bearer KEY'")
        if len(credential) > MAX_CREDENTIAL:
            raise Unauthenticated(f"API key: is longer than {MAX_CREDENTIAL} characters")
        # No key has a dot, and every token has two.
        if self._tokens is not None and ("." in credential or self.keyring is None):
            caller = await self._tokens.caller(credential)
        elif self.keyring is not None:
            caller = self.keyring.caller(credential)
        else:
            raise Unauthenticated("API key: is not correct")
        if self.keyring is not None and self.keyring.is_archived(caller):
            raise Unauthenticated("API key: its project is archived")
        return self._weighed(caller)

    def _weighed(self, caller: Caller) -> Caller:
        weight = self._weights.get(caller.tenant)
        return caller if weight is None else replace(caller, weight=weight)

    def has_ended(self, caller: Caller) -> bool:
        """Whether one that was let in would not be any more: his key is revoked or has expired, his token has, or
        their project is archived."""
        if not caller.key_id and caller.expires_at is not None and caller.expires_at + LEEWAY_S <= time.time():
            return True
        return self.keyring is not None and self.keyring.has_ended(caller)


def bearer(authorization: str) -> str | None:
    """The credential in what ``authorization`` says; None if it is of another kind."""
    kind, _, credential = authorization.partition(" ")
    return credential.strip() if kind.lower() == BEARER else None


@contextlib.asynccontextmanager
async def open_guard(settings: Auth) -> AsyncIterator[Guard | None]:
    """The guard of these settings; None where whoever comes is let in.

    Raises:
        SettingsError: the database's URL is none.
    """
    if not settings.enabled:
        yield None
        return
    async with contextlib.AsyncExitStack() as stack:
        keyring = tokens = None
        if settings.oidc:
            from hycluster.auth.tokens import Tokens

            tokens = Tokens(settings.oidc)
        if settings.keys:
            from hycluster.auth.database import open_database
            from hycluster.auth.keyring import Keyring

            keyring = Keyring(open_database(settings), settings)
            # It may have to wait for the database. Whoever is cancelled meanwhile leaves what the thread enters.
            entering = asyncio.create_task(asyncio.to_thread(keyring.__enter__))
            stack.push_async_callback(_left, keyring, entering)
            await asyncio.shield(entering)
        yield Guard(keyring, tokens, settings.weights, None if settings.tls is None else settings.tls.clients)


async def _left(keyring: Keyring, entering: asyncio.Task[Keyring]) -> None:
    async def leave() -> None:
        await asyncio.wait({entering})
        if entering.exception() is None:
            await asyncio.to_thread(keyring.__exit__, None, None, None)

    # To its end, also where whoever waits for it is cancelled once more.
    await asyncio.shield(asyncio.create_task(leave()))
