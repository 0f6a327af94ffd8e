"""The database of keys: how it is reached, made and brought to this version.

SQLite in ``HYCLUSTER_HOME`` where nothing else is said, PostgreSQL for several machines.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from hycluster.errors import SettingsError, Unavailable, one_line
from hycluster.settings.auth import Auth
from hycluster.settings.base import private_home

VARIABLE = "HYCLUSTER_AUTH_DATABASE"
# Longer, and a revoked key would be known too late to be dead in 2 s.
ANSWER_TIMEOUT_S = 2
# Any number that nobody else takes: who holds it migrates.
_MIGRATING = 0x687963
_MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(settings: Auth) -> Engine:
    """The engine; connects nowhere yet.

    Raises:
        SettingsError: the URL is none, or its driver is not installed.
    """
    try:
        url = make_url(_said(settings))
        return _sqlite(url) if url.get_backend_name() == "sqlite" else _server(url)
    except SettingsError:
        raise
    # What it says may hold the password.
    except (ArgumentError, ValueError, ModuleNotFoundError) as error:
        missing = f"; {error.name!r} is not installed" if isinstance(error, ModuleNotFoundError) else ""
        raise SettingsError(
            f"auth.database: is no URL that can be used{missing}; must be like"
            " postgresql+psycopg://USER:PASSWORD@HOST/NAME or sqlite:////FOLDER/FILE"
        ) from None


def database_url(settings: Auth) -> str | None:
    """Where it is, for others to find it; None if that holds a password."""
    said = _said(settings)
    with contextlib.suppress(ArgumentError):
        return None if make_url(said).password else said
    return None


def _said(settings: Auth) -> str:
    return settings.database or os.environ.get(VARIABLE) or f"sqlite:///{private_home() / 'keys.db'}"


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise SettingsError("auth.database: sqlite needs a file; other processes have to see it")
    # Never made by looking at it: a file that is gone is a database that is away, and not an empty one.
    opened = url.set(database=f"file:{url.database}", query={"mode": "rw", "uri": "true"})
    # A connection that is kept would go on with a file that has been moved.
    engine = create_engine(opened, poolclass=NullPool, hide_parameters=True, connect_args={"timeout": ANSWER_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _keep_references(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA foreign_keys=ON")

    return engine


def _server(url: URL) -> Engine:
    arguments: dict[str, Any] = {}
    if url.get_backend_name() == "postgresql":
        arguments = {
            "connect_timeout": ANSWER_TIMEOUT_S,
            "tcp_user_timeout": ANSWER_TIMEOUT_S * 1000,
            "options": f"-c statement_timeout={ANSWER_TIMEOUT_S * 1000}",
        }
    return create_engine(url, pool_size=1, max_overflow=2, pool_pre_ping=True, hide_parameters=True,
                         connect_args=arguments)  # fmt: skip


def prepare_database(settings: Auth) -> bool:
    """As :func:`bring_up_to_date`; for who asks nothing else and then holds no connection.

    Raises:
        SettingsError, Unavailable
    """
    engine = open_database(settings)
    try:
        return bring_up_to_date(engine)
    finally:
        engine.dispose()


def bring_up_to_date(engine: Engine) -> bool:
    """Bring the database to this version, and make it if it is not there; True if there was something to do.

    Any number of processes may do so at once.

    Raises:
        SettingsError: a newer hycluster has made it.
        Unavailable: it can't be reached or written.
    """
    try:
        with contextlib.ExitStack() as stack:
            if engine.dialect.name == "sqlite":
                stack.enter_context(_made(_file_of(engine)))
            connection = stack.enter_context(engine.begin())
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATING})
            if _is_current(connection):
                return False
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return True
    except (DBAPIError, OSError) as error:
        raise away(error) from None


def is_up_to_date(engine: Engine) -> bool:
    """Whether the database is there and of this version; changes nothing.

    Raises:
        SettingsError: a newer hycluster has made it.
        Unavailable: it can't be reached.
    """
    if engine.dialect.name == "sqlite" and not _file_of(engine).exists():
        return False
    try:
        with engine.connect() as connection:
            return _is_current(connection)
    except DBAPIError as error:
        raise away(error) from None


def _is_current(connection: Connection) -> bool:
    scripts = ScriptDirectory.from_config(_config())
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise SettingsError(f"auth.database: is of version {found}, which a newer hycluster has made; use that one")
    return found == scripts.get_current_head()


def away(error: Exception) -> Unavailable:
    """The database's error in one line, without what it was asked."""
    said = error.orig if isinstance(error, DBAPIError) else error
    return Unavailable(f"auth.database: can't be used now: {one_line(said or error, 200)}", retry_after_s=1)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _file_of(engine: Engine) -> Path:
    return Path(str(engine.url.database).removeprefix("file:"))


def _made(file: Path) -> FileLock:
    """The file, for nobody but its user, and the lock to be held while it is changed."""
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    return FileLock(f"{file}.lock", mode=0o600)
