from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from jwt import PyJWKSet
from sqlalchemy import Engine

from hycluster.auth.api_key import new_key
from hycluster.auth.caller import Caller
from hycluster.auth.guard import MAX_CREDENTIAL, Guard, bearer, open_guard
from hycluster.auth.keyring import Keyring
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


async def test_cancelled_while_it_opens_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, answers = threading.Event(), threading.Event()
    disposed: list[Engine] = []

    def look(keyring: Keyring) -> None:
        looks.set()
        assert answers.wait(30)

    def dispose(engine: Engine) -> None:
        disposed.append(engine)

    monkeypatch.setattr(Keyring, "look", look)
    monkeypatch.setattr(Engine, "dispose", dispose)

    async def open_it() -> None:
        async with open_guard(Auth(enabled=True, database=f"sqlite:///{tmp_path / 'keys.db'}")):
            pytest.fail("was opened")

    opening = asyncio.create_task(open_it())
    assert await asyncio.to_thread(looks.wait, 30)
    opening.cancel()
    await asyncio.sleep(0)
    answers.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not [thread for thread in threading.enumerate() if thread.name == "keyring"]
    assert len(disposed) == 1


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
