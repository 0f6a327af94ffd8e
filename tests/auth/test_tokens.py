"""Tokens of an identity provider: a real HTTP server that publishes its keys, and all that is none of its tokens."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from unittest import mock

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from hycluster.auth.caller import Caller
from hycluster.auth.guard import Guard
from hycluster.auth.tokens import FETCH_AGAIN_AFTER_S, Tokens
from hycluster.errors import HyclusterError, Unauthenticated, Unavailable
from hycluster.settings.auth import Auth, Oidc

pytestmark = pytest.mark.timeout(120)

ISSUER, AUDIENCE = "https://id.example", "hycluster"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())


def published(**keys: Any) -> dict[str, Any]:
    """A set of public keys, by their ids."""
    found = []
    for key_id, key in keys.items():
        algorithm: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
        name = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        found.append({**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "alg": name, "use": "sig"})
    return {"keys": found}


class Provider:
    """Attributes: keys: what it publishes; None: it fails. asked: how often it was."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] | None = published(one=RSA, curve=EC)
        self.asked = 0
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                body = json.dumps(provider.keys).encode()
                self.send_response(500 if provider.keys is None else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    thread = threading.Thread(target=provider.server.serve_forever)
    thread.start()
    yield provider
    provider.server.shutdown()
    thread.join()
    provider.server.server_close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(provider: Provider, clock: Clock) -> Guard:
    settings = Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url=provider.url, keys_refresh_s=300, keys_last_s=3600)
    return Guard(None, Tokens([settings], clock))


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    given = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 600, "tenant": "acme", "project": "search"}
    return {name: value for name, value in (given | changes).items() if value is not None}


def token(key: Any = RSA, algorithm: str = "RS256", kid: str | None = "one", **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers={"kid": kid} if kid else {})


async def answered(guard: Guard, credential: str) -> Caller | type[HyclusterError]:
    try:
        return await guard.caller(credential)
    except HyclusterError as error:
        return type(error)


async def test_who_it_is(guard: Guard, provider: Provider) -> None:
    ends_at = int(time.time()) + 600
    assert await guard.caller(token(exp=ends_at)) == Caller(
        "acme", "search", "alice", frozenset(), frozenset(), ends_at
    )
    asked = token(EC, "ES256", "curve", scope="openid batch model:a model:b root", aud=["x", AUDIENCE])
    caller = await guard.caller(asked)
    assert (caller.models, caller.scopes) == (frozenset({"a", "b"}), frozenset({"batch"}))
    caller = await guard.caller(token(scope=["admin", "model:*", "model:a"]))
    assert caller.models is None
    assert caller.scopes == {"admin"}
    assert provider.asked == 1


def _plain(part: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def _by_hand(header: dict[str, Any], signature: str = "", **changes: Any) -> str:
    return f"{_plain(header)}.{_plain(claims(**changes))}.{signature}"


def _as_a_secret() -> str:
    """Signed with the public key, as if it were a secret: what a checker takes that believes the token's algorithm."""
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = f"{_plain({'alg': 'HS256', 'kid': 'one', 'typ': 'JWT'})}.{_plain(claims())}"
    mac = hmac.new(public, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


FORGED: dict[str, Callable[[], str]] = {
    "no algorithm": lambda: jwt.encode(claims(), "", algorithm="none", headers={"kid": "one"}),
    "no algorithm, by hand": lambda: _by_hand({"alg": "none", "kid": "one"}),
    "None": lambda: _by_hand({"alg": "None", "kid": "one"}, "AAAA"),
    "a secret": _as_a_secret,
    "another key": lambda: token(OTHER),
    "another algorithm": lambda: token(RSA, "RS512"),
    "the other key's name": lambda: token(RSA, kid="curve"),
    "no key named": lambda: token(kid=None),
    "another audience": lambda: token(aud="other"),
    "no audience": lambda: token(aud=None),
    "another issuer": lambda: token(iss="https://evil.example"),
    "nearly the issuer": lambda: token(iss=f"{ISSUER}/"),
    "no issuer": lambda: token(iss=None),
    "issuers": lambda: _by_hand({"alg": "RS256", "kid": "one"}, "AAAA", iss=[ISSUER]),
    "expired": lambda: token(exp=int(time.time()) - 3600),
    "without an end": lambda: token(exp=None),
    "not yet": lambda: token(nbf=int(time.time()) + 3600),
    "an endless number": lambda: _by_hand({"alg": "RS256", "kid": "one"}, "AAAA", exp=float("inf")),
    "nobody": lambda: token(sub=None),
    "half a surrogate pair": lambda: token(sub="alice\ud800"),
    "a zero": lambda: token(sub="alice\0"),
    "no tenant": lambda: token(tenant=None),
    "a tenant that is another's project": lambda: token(tenant="acme/search"),
    "tenants": lambda: token(tenant=["acme"]),
    "a project that is no name": lambda: token(project=""),
    "odd scopes": lambda: token(scope=7),
    "changed": lambda: token()[:-4] + "AAAA",
    "cut": lambda: token()[:-30],
    "dots": lambda: "..",
    "a word": lambda: "hello",
    "deep": lambda: base64.urlsafe_b64encode(b"[" * 5000).rstrip(b"=").decode() + ".e30.e30",
    "not base64": lambda: "ä.ö.ü",
    "a key of its own": lambda: _by_hand(
        {"alg": "RS256", "kid": "one", "jwk": published(x=OTHER)["keys"][0], "jku": "http://evil.example"}, "AAAA"
    ),
}  # fmt: skip


@pytest.mark.parametrize("forged", FORGED)
async def test_what_is_none_of_its_tokens(guard: Guard, provider: Provider, forged: str) -> None:
    assert await answered(guard, FORGED[forged]()) is Unauthenticated
    assert isinstance(await answered(guard, token()), Caller)


async def test_its_keys_change(guard: Guard, provider: Provider, clock: Clock) -> None:
    assert isinstance(await answered(guard, token()), Caller)
    provider.keys = published(two=OTHER)
    new = token(OTHER, kid="two")
    # Known at once, but not asked for at every forged one.
    clock.now_s += FETCH_AGAIN_AFTER_S
    assert isinstance(await answered(guard, new), Caller)
    assert await answered(guard, token()) is Unauthenticated
    asked = provider.asked
    for number in range(50):
        assert await answered(guard, token(OTHER, kid=f"forged {number}")) is Unauthenticated
    assert provider.asked == asked


async def test_one_that_is_withdrawn_goes_when_they_are_fetched_anew(
    guard: Guard, provider: Provider, clock: Clock
) -> None:
    assert isinstance(await answered(guard, token()), Caller)
    provider.keys = published(two=OTHER)
    clock.now_s += 301
    assert await answered(guard, token()) is Unauthenticated


async def test_its_keys_can_not_be_had(guard: Guard, provider: Provider, clock: Clock) -> None:
    keys, provider.keys = provider.keys, None
    assert await answered(guard, token()) is Unavailable
    provider.keys = keys
    clock.now_s += FETCH_AGAIN_AFTER_S
    assert isinstance(await answered(guard, token()), Caller)
    provider.keys = None
    clock.now_s += 3000
    assert isinstance(await answered(guard, token()), Caller)
    clock.now_s += 1000
    assert await answered(guard, token()) is Unavailable


async def test_who_is_known_waits_for_no_provider_that_hangs(provider: Provider, clock: Clock) -> None:
    asked, hangs = asyncio.Event(), asyncio.Event()
    settings = Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url=provider.url, keys_refresh_s=300, keys_last_s=3600)
    tokens = Tokens([settings], clock)
    guard = Guard(None, tokens)
    assert isinstance(await answered(guard, token()), Caller)
    clock.now_s += 301

    async def hang() -> None:
        asked.set()
        await hangs.wait()
        clock.now_s += 5

    with mock.patch.object(tokens._issuers[ISSUER]._keys, "_fetch", side_effect=hang) as fetch:
        first = asyncio.create_task(answered(guard, token()))
        await asked.wait()
        # Whoever comes meanwhile is let in by what is known; unknown keys wait, and it is asked once for all of them.
        assert isinstance(await answered(guard, token()), Caller)
        unknown = [asyncio.create_task(answered(guard, token(OTHER, kid="two"))) for _ in range(8)]
        await asyncio.sleep(0)
        hangs.set()
        assert isinstance(await first, Caller)
        assert await asyncio.gather(*unknown) == [Unauthenticated] * 8
        assert fetch.call_count == 1


@pytest.mark.parametrize(
    ("tenants", "admins", "may"),
    [(None, None, True), (None, False, False), (("acme",), None, False), (("acme",), True, True)],
)
async def test_who_speaks_for_some_tenants_makes_nobody_an_administrator_of_all(
    provider: Provider, clock: Clock, tenants: tuple[str, ...] | None, admins: bool | None, may: bool
) -> None:
    settings = Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url=provider.url, tenants=tenants, admins=admins)
    guard = Guard(None, Tokens([settings], clock))
    caller = await guard.caller(token(scope="admin batch"))
    assert caller.scopes == ({"admin", "batch"} if may else {"batch"})


async def test_an_issuer_speaks_for_its_tenants(provider: Provider, clock: Clock) -> None:
    settings = Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url=provider.url, tenants=("acme",))
    guard = Guard(None, Tokens([settings], clock))
    assert isinstance(await answered(guard, token()), Caller)
    assert await answered(guard, token(tenant="other")) is Unauthenticated
    with pytest.raises(ValueError, match="not allowed twice"):
        Auth(enabled=True, oidc=(settings, settings))


async def test_a_secret_that_is_published_is_no_key(guard: Guard, provider: Provider) -> None:
    secret = base64.urlsafe_b64encode(b"x" * 32).rstrip(b"=").decode()
    provider.keys = {"keys": [*published(one=RSA)["keys"], {"kty": "oct", "k": secret, "kid": "s", "alg": "HS256"}]}
    assert (
        await answered(guard, jwt.encode(claims(), b"x" * 32, algorithm="HS256", headers={"kid": "s"}))
        is Unauthenticated
    )
    assert isinstance(await answered(guard, token()), Caller)


@pytest.mark.parametrize("url", ["http://id.example/keys", "file:///etc/keys", "http://localhost.evil.example/"])
def test_keys_come_by_tls(url: str) -> None:
    with pytest.raises(ValueError, match="must be https"):
        Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url=url)


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_secrets_are_no_algorithm(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="algorithms"):
        Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url="https://id.example/", algorithms=(algorithm,))
