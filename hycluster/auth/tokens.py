"""Tokens of an identity provider (OIDC): JWTs, checked here against the keys that the provider publishes.

Checking is PyJWT's. Here is what it is to check: one of the issuers in the settings, for the audience that is this
service, within its time, signed by a public key of that issuer's with an algorithm that the settings allow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import jwt
from jwt import PyJWK, PyJWKSet

from hycluster.auth.caller import LEEWAY_S, SCOPES, Caller
from hycluster.auth.names import NAME
from hycluster.errors import Unauthenticated, Unavailable, one_line
from hycluster.settings.auth import Oidc

logger = logging.getLogger(__name__)

# A token that names a key which is not known has the keys fetched anew, and anybody can write such tokens.
FETCH_AGAIN_AFTER_S = 5.0
FETCH_TIMEOUT_S = 5.0
MAX_KEYS_BYTES = 1 << 20
# In a token's scopes: a model that it may use.
MODEL = "model:"
ALL_MODELS = f"{MODEL}*"
MAX_SUBJECT = 200
_REQUIRED = ["exp", "iss", "aud", "sub"]
# What somebody else's text can make of the parsers below: none of it is a token.
_NO_TOKEN = (jwt.PyJWTError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


class Tokens:
    """All issuers of the settings."""

    def __init__(self, issuers: Sequence[Oidc], clock: Callable[[], float] = time.monotonic) -> None:
        self._issuers = {issuer.issuer: _Issuer(issuer, clock) for issuer in issuers}

    async def caller(self, token: str) -> Caller:
        """Who bears this token.

        Raises:
            Unauthenticated: nobody.
            Unavailable: the issuer's keys can't be had.
        """
        try:
            claimed: Any = jwt.decode(token, options={"verify_signature": False}).get("iss")
            issuer = self._issuers[claimed]
        except _NO_TOKEN:
            raise Unauthenticated("token: is none of an issuer that is known here") from None
        return await issuer.caller(token)


class _Issuer:
    def __init__(self, settings: Oidc, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._keys = _PublishedKeys(settings, clock)

    async def caller(self, token: str) -> Caller:
        settings = self._settings
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
        except _NO_TOKEN:
            raise Unauthenticated("token: its header can't be read") from None
        key = await self._keys.find(key_id)
        try:
            claims = jwt.decode(
                token,
                key,
                # The token's own word for it is of no account.
                algorithms=list(settings.algorithms),
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=LEEWAY_S,
                options={"require": _REQUIRED},
            )
            return self._caller(claims)
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("token: has expired") from None
        except _NO_TOKEN as error:
            # Its own words, which hold nothing of the token.
            said = str(error) if isinstance(error, jwt.PyJWTError) else "its claims can't be read"
            raise Unauthenticated(f"token: is not correct: {one_line(said, 100)}") from None

    def _caller(self, claims: dict[str, Any]) -> Caller:
        settings = self._settings
        tenant, project = claims[settings.tenant_claim], claims[settings.project_claim]
        for name, value in ((settings.tenant_claim, tenant), (settings.project_claim, project)):
            if not isinstance(value, str) or not NAME.fullmatch(value):
                raise jwt.InvalidTokenError(f"the claim {name!r} is no name")
        said = claims.get(settings.scopes_claim, ())
        scopes = [str(each) for each in (said.split() if isinstance(said, str) else said)]
        models = (
            None
            if ALL_MODELS in scopes
            else frozenset(scope.removeprefix(MODEL) for scope in scopes if scope.startswith(MODEL))
        )
        if settings.tenants is not None and tenant not in settings.tenants:
            raise jwt.InvalidTokenError(f"its issuer may not speak for the tenant {tenant!r}")
        subject = str(claims["sub"])[:MAX_SUBJECT]
        if not subject.isprintable():
            # It goes into the ledger and the audit log, where half a surrogate pair or a zero can't be written.
            raise jwt.InvalidTokenError("the claim 'sub' is no text that can be printed")
        allowed = frozenset(scopes) & frozenset(SCOPES)
        if not settings.may_administer:
            allowed -= {"admin"}
        return Caller(tenant, project, subject, models, allowed, float(claims["exp"]))


class _PublishedKeys:
    """The keys of an issuer as it published them last (JWKS). One that is new is fetched when a token names it."""

    def __init__(self, settings: Oidc, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._fetching = asyncio.Lock()
        self._keys: dict[str, PyJWK] = {}
        self._fetched_s = self._tried_s = float("-inf")

    async def find(self, key_id: Any) -> PyJWK:
        """
        Raises:
            Unauthenticated: the issuer has no such key.
            Unavailable: that can't be told.
        """
        # One that is known but old goes on while somebody has them fetched.
        if not self._has(key_id) and not (self._fetching.locked() and self._lasts(key_id)):
            async with self._fetching:
                # Whoever waited may have had it fetched, or have waited for that in vain.
                if not self._has(key_id) and self._clock() - self._tried_s >= FETCH_AGAIN_AFTER_S:
                    try:
                        await self._fetch()
                    finally:
                        self._tried_s = self._clock()
        known_for_s = self._clock() - self._fetched_s
        if known_for_s > self._settings.keys_last_s:
            raise Unavailable("token: can't be checked now, its issuer's keys can't be had", retry_after_s=5)
        if not isinstance(key_id, str) or key_id not in self._keys:
            raise Unauthenticated("token: is signed with a key that its issuer does not publish")
        return self._keys[key_id]

    def _has(self, key_id: Any) -> bool:
        fresh = self._clock() - self._fetched_s < self._settings.keys_refresh_s
        return fresh and isinstance(key_id, str) and key_id in self._keys

    def _lasts(self, key_id: Any) -> bool:
        known = isinstance(key_id, str) and key_id in self._keys
        return known and self._clock() - self._fetched_s <= self._settings.keys_last_s

    async def _fetch(self) -> None:
        url = self._settings.jwks_url
        try:
            async with (
                httpx.AsyncClient(timeout=FETCH_TIMEOUT_S) as client,
                asyncio.timeout(FETCH_TIMEOUT_S),
                client.stream("GET", url) as answer,
            ):
                answer.raise_for_status()
                body = b""
                async for piece in answer.aiter_bytes():
                    body += piece
                    if len(body) > MAX_KEYS_BYTES:
                        raise ValueError(f"it is over {MAX_KEYS_BYTES} bytes")
            published = PyJWKSet.from_json(body.decode())
        except (httpx.HTTPError, TimeoutError, *_NO_TOKEN) as error:
            logger.warning("auth.oidc: keys of %s can't be had: %s", url, one_line(error))
            return
        self._keys = {key.key_id: key for key in published.keys if key.key_id and key.key_type != "oct"}
        self._fetched_s = self._clock()
