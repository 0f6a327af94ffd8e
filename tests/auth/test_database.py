from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, event, text

from hycluster.auth import database
from hycluster.auth.api_key import digest
from hycluster.auth.database import VARIABLE, bring_up_to_date, open_database
from hycluster.auth.store import KeyStore
from hycluster.auth.tables import metadata
from hycluster.errors import SettingsError, Unavailable
from hycluster.settings.auth import Auth

pytestmark = pytest.mark.timeout(120)


def test_the_steps_lead_to_the_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_what_is_in_an_older_one_stays(settings: Auth) -> None:
    engine = open_database(settings)
    bring_up_to_date(engine)
    store = KeyStore(engine, "test")
    made, secret = store.create_key(store.create_project("acme", "search"), "laptop", scopes=["admin"])
    with engine.begin() as connection:
        # As the first version made it.
        added = ("projects", "title"), ("keys", "title"), ("keys", "account_id"), ("keys", "certificate")
        for table, column in added:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        for table in ("service_accounts", "limits", "spent"):
            connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert bring_up_to_date(engine)
    assert store.all_keys() == [made]
    assert list(store.known_keys().callers) == [digest(secret)]
    engine.dispose()


def test_many_processes_may_make_it(settings: Auth) -> None:
    engines = [open_database(settings) for _ in range(4)]
    with ThreadPoolExecutor(len(engines)) as threads:
        assert sorted(threads.map(bring_up_to_date, engines)) == [False, False, False, True]
    for engine in engines:
        engine.dispose()


def test_who_only_makes_it_holds_no_connection(settings: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``hycluster serve``, which runs for months."""
    closed: list[object] = []
    opened = []

    def open_watched(settings: Auth) -> Engine:
        engine = open_database(settings)
        event.listen(engine, "connect", lambda connection, _: opened.append(connection))
        event.listen(engine, "close", lambda connection, _: closed.append(connection))
        return engine

    monkeypatch.setattr(database, "open_database", open_watched)
    assert [database.prepare_database(settings) for _ in range(2)] == [True, False]
    assert len(opened) >= 2
    assert closed == opened


def test_a_newer_one_is_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SettingsError, match="of version 9999, which a newer hycluster has made"):
        bring_up_to_date(engine)


def test_by_default_it_is_a_file_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    engine = open_database(Auth(enabled=True))
    bring_up_to_date(engine)
    KeyStore(engine).create_project("a", "b")
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "home").iterdir()} == {
        "keys.db": 0o600,
        "keys.db.lock": 0o600,
    }


def test_a_file_that_is_gone_is_away_and_not_empty(tmp_path: Path) -> None:
    engine = open_database(Auth(database=f"sqlite:///{tmp_path / 'keys.db'}"))
    with pytest.raises(Unavailable, match=r"auth\.database: can't be used now"):
        KeyStore(engine).count_changes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "sqlite://",
        "sqlite:///:memory:",
        "oracle+none://u:hunter2@h/d",
        "postgresql+psycopg://u:hunter2@h:x/d",
    ],
)
def test_what_is_no_database(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, url)
    with pytest.raises(SettingsError) as error:
        open_database(Auth())
    assert "hunter2" not in error.value.message
