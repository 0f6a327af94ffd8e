"""Which database of keys and which ledger a command acts on: those of the settings that are named, those of the running
service, or the default ones."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hycluster.serving import running
from hycluster.settings.auth import Auth
from hycluster.settings.read import load_settings
from hycluster.terminal import echo

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from hycluster.auth.store import KeyStore, Project
    from hycluster.ledger.books import Books

DEFAULT_TENANT = "default"

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file whose database or ledger it is. Default: that of the"
                 " running service of this HYCLUSTER_HOME, HYCLUSTER_AUTH_DATABASE, or the default one."),
]  # fmt: skip
ProjectName = Annotated[str, typer.Option("--project", metavar="NAME", help="A project of the tenant.")]
TenantName = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose project it is.")]


def database_of(config: Path | None) -> Engine:
    """
    Raises:
        SettingsError: the settings can't be read, or their URL is none.
    """
    from hycluster.auth.database import open_database

    services = [one.database for one in _services(config) if one.database]
    # The last one that was started, should there be several.
    if services:
        return open_database(Auth(database=services[-1]))
    return open_database(load_settings(config).auth)


def ledger_of(config: Path | None) -> Books:
    """
    Raises:
        SettingsError: the settings can't be read, or the ledger's store can't be used.
    """
    from hycluster.ledger.books import open_books

    services = [one.ledger for one in _services(config) if one.ledger]
    return open_books(services[-1] if services else load_settings(config).ledger_place)


def is_ledger_off(config: Path | None) -> bool:
    """Whether nothing is written down there, as far as that is known here."""
    services = _services(config)
    return services[-1].ledger == "" if services else not load_settings(config).keeps_ledger


def _services(config: Path | None) -> list[running.Started]:
    """Those that run from this home, where no settings file is named."""
    if config is not None:
        return []
    named = os.environ.get("RAY_ADDRESS")
    return [one for one in running.started_here() if not named or one.address == named]


def store_of(config: Path | None) -> KeyStore:
    from hycluster.auth.database import bring_up_to_date
    from hycluster.auth.store import KeyStore

    engine = database_of(config)
    bring_up_to_date(engine)
    return KeyStore(engine, f"cli {_user()}")


def project_or_new(store: KeyStore, tenant: str, name: str) -> Project:
    """The project, made if it is not there, which is said."""
    found = next((one for one in store.projects() if (one.tenant, one.name) == (tenant, name)), None)
    if found is None:
        found = store.create_project(tenant, name)
        echo(f"project {tenant}/{name} is new", err=True)
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    # In a container its number may have no name.
    except (KeyError, OSError):
        return str(os.getuid())
