from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jwt import PyJWKSet

from hycluster.auth.api_key import new_key
from hycluster.auth.caller import Caller
from hycluster.auth.guard import MAX_CREDENTIAL, Guard, bearer, open_guard
from hycluster.auth.tokens import Tokens
from hycluster.errors import Unauthenticated
from hycluster.settings.auth import Auth, Oidc
from tests.auth.keyed import keyed
from tests.auth.test_tokens import AUDIENCE, ISSUER, RSA, published, token

URL = "http://127.0.0.1:9/keys"


async def test_nobody_is_asked_by_default() -> None:
    async with open_guard(Auth()) as guard:
        assert guard is None


async def test_it_opens_and_closes(tmp_path: Path) -> None:
    settings = Auth(enabled=True, database=f"sqlite:///{tmp_path / 'keys.db'}")
    async with open_guard(settings) as guard:
        assert guard is not None
        with pytest.raises(Unauthenticated, match="not known here"):
            await guard.caller(new_key())
        with pytest.raises(Unauthenticated, match=f"longer than {MAX_CREDENTIAL}"):
            await guard.caller("x" * (MAX_CREDENTIAL + 1))
        for nothing in (None, ""):
            with pytest.raises(Unauthenticated, match="is missing"):
                await guard.caller(nothing)


@pytest.mark.parametrize(
    ("said", "credential"),
    [
        ("Bearer k", "k"),
        ("bearer  k ", "k"),
        ("BEARER k", "k"),
        ("Bearer", ""),
        ("Basic k", None),
        ("k", None),
        ("", None),
    ],
)
def test_what_a_header_bears(said: str, credential: str | None) -> None:
    assert bearer(said) == credential


async def test_keys_and_tokens_side_by_side(tmp_path: Path) -> None:
    tokens = Tokens([Oidc(issuer=ISSUER, audience=AUDIENCE, jwks_url=URL)])
    issuer = tokens._issuers[ISSUER]
    issuer._keys._keys = {"one": PyJWKSet.from_dict(published(one=RSA)).keys[0]}
    issuer._keys._fetched_s = issuer._keys._clock()
    with keyed(tmp_path) as keys:
        guard = Guard(keys.guard.keyring, tokens)
        assert (await guard.caller(keys.key())).key == "test"
        caller = await guard.caller(token())
        assert isinstance(caller, Caller)
        assert caller.key == "alice"
        keys.archive()
        with pytest.raises(Unauthenticated, match="its project is archived"):
            await guard.caller(token())
        await guard.caller(keys.key(other=True))


def test_what_is_off_is_not_imported() -> None:
    code = "import sys, hycluster.ingress.grpc; print({'sqlalchemy', 'alembic', 'jwt'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
