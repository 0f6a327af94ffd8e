from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from hycluster.auth.database import bring_up_to_date, open_database
from hycluster.auth.store import KeyStore
from hycluster.settings.auth import Auth
from tests.postgres import Postgres, postgres


@pytest.fixture(scope="package")
def server() -> Iterator[Postgres]:
    # Not below pytest's own folder, which only its user may enter.
    with tempfile.TemporaryDirectory(prefix="hyt-pg") as folder, postgres(Path(folder)) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Auth:
    """Of an empty database."""
    url = f"sqlite:///{tmp_path / 'keys.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("server").url
        engine = open_database(Auth(database=url))
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        engine.dispose()
    return Auth(enabled=True, database=url, poll_s=0.05)


@pytest.fixture
def engine(settings: Auth) -> Iterator[Engine]:
    engine = open_database(settings)
    bring_up_to_date(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> KeyStore:
    return KeyStore(engine, "test")
