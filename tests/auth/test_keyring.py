"""What an ingress process knows of keys, while the database changes, goes away and comes back."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hycluster.auth.api_key import digest, new_key
from hycluster.auth.caller import Caller
from hycluster.auth.database import open_database
from hycluster.auth.keyring import AWAY_AFTER_S, Keyring
from hycluster.auth.store import KeyStore, Project
from hycluster.errors import HyclusterError, Unauthenticated, Unavailable
from hycluster.settings.auth import Auth
from tests.postgres import Postgres
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)


class Clock:
    """Moves when it is told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def project(store: KeyStore) -> Project:
    return store.create_project("acme", "search")


@pytest.fixture
def ring(settings: Auth, store: KeyStore) -> Iterator[Keyring]:
    with Keyring(open_database(settings), settings) as ring:
        yield ring


def answered(ring: Keyring, key: str) -> str:
    """Who it is, or the error's name."""
    try:
        return ring.caller(key).key
    except HyclusterError as error:
        return type(error).__name__


def test_of_two_looks_at_once_the_slower_takes_nothing_back(
    settings: Auth, store: KeyStore, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_database(settings)
    ring = Keyring(engine, settings)
    ring.look()
    counted, go_on, original = threading.Event(), threading.Event(), ring.store.count_changes

    def slow() -> int:
        changes = original()
        if not counted.is_set():
            counted.set()
            go_on.wait(30)
        return changes

    monkeypatch.setattr(ring.store, "count_changes", slow)
    looks = [threading.Thread(target=ring.look) for _ in range(2)]
    looks[0].start()
    assert counted.wait(30)
    _, secret = store.create_key(project, "new")
    looks[1].start()
    looks[1].join(0.5)
    go_on.set()
    for look in looks:
        look.join()
    assert answered(ring, secret) == "new"
    engine.dispose()


# Says when a key lets in, and when it does no more.
FOLLOW = """
import sys, time
from hycluster.auth.database import open_database
from hycluster.auth.keyring import Keyring
from hycluster.errors import Unauthenticated
from hycluster.settings.auth import Auth

settings = Auth(enabled=True, database=sys.argv[1])
with Keyring(open_database(settings), settings) as ring:
    for wanted in (True, False):
        known = not wanted
        while known is not wanted:
            try:
                known = bool(ring.caller(sys.argv[2]))
            except Unauthenticated:
                known = False
            time.sleep(0.01)
        print(wanted, flush=True)
"""


def test_a_revoked_key_is_dead_at_each_process(settings: Auth, store: KeyStore, project: Project) -> None:
    made, secret = store.create_key(project, "laptop")
    command = [sys.executable, "-c", FOLLOW, str(settings.database), secret]
    with ExitStack() as stack:
        followers = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) for _ in range(2)
        ]
        for wanted in ("True\n", "False\n"):
            # The test's own limit is the bound; how long it takes by default is in docs/auth.md.
            assert [follower.stdout.readline() for follower in followers if follower.stdout] == [wanted] * 2
            store.revoke_key(made.id)
    assert [follower.returncode for follower in followers] == [0, 0]


def test_a_new_key_is_known_and_a_revoked_one_is_not(ring: Keyring, store: KeyStore, project: Project) -> None:
    made, secret = store.create_key(project, "laptop")
    eventually(lambda: answered(ring, secret) == "laptop")
    store.revoke_key(made.id)
    eventually(lambda: answered(ring, secret) == "Unauthenticated")
    for _ in range(3):
        assert answered(ring, secret) == "Unauthenticated"


def test_ten_thousand_others(ring: Keyring, store: KeyStore, project: Project) -> None:
    _, secret = store.create_key(project, "laptop")
    eventually(lambda: answered(ring, secret) == "laptop")
    others = [new_key() for _ in range(10_000)] + [secret[:size] for size in range(len(secret))]
    others += [secret + "x", secret.lower(), secret.upper(), f" {secret}", digest(secret).hex(), "", "\0", "ä" * 50]
    assert {answered(ring, key) for key in others} == {"Unauthenticated"}


def test_an_expired_one(ring: Keyring, store: KeyStore, project: Project) -> None:
    _, secret = store.create_key(project, "laptop", expires_at=int(time.time()) - 1)
    _, later = store.create_key(project, "later", expires_at=int(time.time()) + 3600)
    eventually(lambda: answered(ring, later) == "later")
    with pytest.raises(Unauthenticated, match="has expired"):
        ring.caller(secret)


def test_the_database_goes_and_comes_back(
    settings: Auth, store: KeyStore, project: Project, tmp_path: Path, request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    known_key = store.create_key(project, "known")[1]
    file, elsewhere = tmp_path / "keys.db", tmp_path / "elsewhere.db"
    server: Postgres | None = None if "sqlite" in str(settings.database) else request.getfixturevalue("server")
    with Keyring(open_database(settings), settings) as ring:
        assert answered(ring, known_key) == "known"
        file.rename(elsewhere) if server is None else server.kill()
        strange = new_key()
        assert AWAY_AFTER_S <= 2
        eventually(lambda: answered(ring, strange) == "Unavailable")
        assert answered(ring, known_key) == "known"
        # Wrong without a look.
        assert answered(ring, known_key[:-1]) == "Unauthenticated"
        elsewhere.rename(file) if server is None else server.start()
        eventually(lambda: answered(ring, strange) == "Unauthenticated")
        assert answered(ring, known_key) == "known"
        new = store.create_key(project, "new")[1]
        eventually(lambda: answered(ring, new) == "new")
    said = [record for record in caplog.messages if "auth.database" in record]
    assert len(said) == 2, said
    for secret in (known_key, strange, new):
        assert secret not in caplog.text
        assert digest(secret).hex() not in caplog.text


def test_known_keys_go_on_for_the_grace(settings: Auth, store: KeyStore, project: Project) -> None:
    secret, clock = store.create_key(project, "laptop")[1], Clock()
    ring = Keyring(open_database(settings), settings.model_copy(update={"grace_s": 60.0}), clock)
    assert answered(ring, secret) == "Unavailable"
    ring.look()
    for now_s, known, strange in (
        (1, "laptop", "Unauthenticated"),
        (60, "laptop", "Unavailable"),
        (61, "Unavailable", "Unavailable"),
    ):
        clock.now_s = now_s
        assert (answered(ring, secret), answered(ring, new_key())) == (known, strange)
    ring.look()
    assert (answered(ring, secret), answered(ring, new_key())) == ("laptop", "Unauthenticated")
    ring._engine.dispose()


def test_without_a_database_nobody_is_let_in_and_it_is_made_when_it_can_be(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    settings = Auth(enabled=True, database=f"sqlite:///{folder / 'keys.db'}", poll_s=0.05)
    with Keyring(open_database(settings), settings) as ring:
        with pytest.raises(Unavailable) as error:
            ring.caller(new_key())
        assert error.value.retry_after_s == 1
        # Nor whoever has a token: nobody can tell whether his project is archived.
        with pytest.raises(Unavailable):
            ring.is_archived(Caller("acme", "search", "alice"))
        folder.mkdir()
        eventually(lambda: answered(ring, new_key()) == "Unauthenticated")
