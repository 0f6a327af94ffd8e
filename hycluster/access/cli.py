"""``hycluster keys`` and ``hycluster projects``: who may call, in the database of keys; no cluster need run."""

from __future__ import annotations

import getpass
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hycluster.consent import Yes, ask
from hycluster.errors import InvalidInput, shown
from hycluster.settings.access import Access
from hycluster.settings.read import DEFAULT_SETTINGS, load_settings
from hycluster.terminal import console, echo

if TYPE_CHECKING:
    from hycluster.access.store import ApiKey, KeyStore

keys_app = typer.Typer(name="keys", help="Make, list, revoke and replace API keys.", no_args_is_help=True)
projects_app = typer.Typer(name="projects", help="Make, list and archive projects, which keys are of.",
                           no_args_is_help=True)  # fmt: skip

Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file whose access.database it is; default: that of"
                 f" {DEFAULT_SETTINGS}, or the default database."),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ProjectName = Annotated[str, typer.Argument(metavar="TENANT/PROJECT")]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="As 'hycluster keys list' says: key_...")]
_SPAN = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}


@keys_app.command("create")
def create_key(
    project: ProjectName,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A model or adapter it may use; repeatable. Default: all.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help="batch: files, batches, batch priority. admin: all beside the models."),
    ] = None,
    expires: Annotated[str | None, typer.Option(metavar="SPAN", help="From now on, such as 12h or 90d.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It is shown this once; only its SHA-256 is kept."""
    ends_at = None if expires is None else int(time.time()) + _span_s("--expires", expires)
    store = _store(config)
    made, secret = store.create_key(
        store.project(*_split(project)), name, models=model, scopes=scope or (), expires_at=ends_at
    )
    _show_secret(made, secret, as_json)


@keys_app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Argument(metavar="[TENANT/PROJECT]")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List keys, without what is secret of them; revoked ones too."""
    found = [key for key in _store(config).all_keys() if project in (None, f"{key.tenant}/{key.project}")]
    _show(found, as_json, ("id", "tenant", "project", "name", "models", "scopes", "expires_at", "revoked_at"))


@keys_app.command("revoke")
def revoke_key(key_id: KeyId, config: Config = None, yes: Yes = False) -> None:
    """Revoke a key: in 2 s it lets nobody in any more, at any ingress process, for ever."""
    store = _store(config)
    ask(f"{_told(store.key(key_id))} is revoked, for ever", yes=yes)
    store.revoke_key(key_id)
    echo(f"{key_id} is revoked", err=True)


@keys_app.command("rotate")
def rotate_key(
    key_id: KeyId,
    keep: Annotated[
        str | None, typer.Option(metavar="SPAN", help="How long the old one goes on, such as 24h. Default: not at all.")
    ] = None,
    config: Config = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make a key like another one and print it; the old one ends."""
    overlap_s = 0 if keep is None else _span_s("--keep", keep)
    store = _store(config)
    ask(f"{_told(store.key(key_id))} gets a successor and ends {f'in {keep}' if keep else 'now'}, for ever", yes=yes)
    _show_secret(*store.rotate_key(key_id, overlap_s=overlap_s), as_json)


@keys_app.command("migrate")
def migrate_keys(config: Config = None) -> None:
    """Bring the database of keys to this version; ``hycluster serve`` does it too."""
    from hycluster.access.database import bring_up_to_date, open_database

    changed = bring_up_to_date(open_database(_access(config)))
    echo("the database of keys is now of this version" if changed else "the database of keys is of this version")


@keys_app.command("audit")
def show_audit(config: Config = None, as_json: AsJson = False) -> None:
    """List every change of keys and projects: when, who, what."""
    _show(_store(config).audit(), as_json, ("at", "actor", "action", "subject", "detail"))


@projects_app.command("create")
def create_project(project: ProjectName, config: Config = None, as_json: AsJson = False) -> None:
    """Make a project of a tenant. Its name is given once, for ever."""
    made = _store(config).create_project(*_split(project))
    echo(json.dumps(asdict(made), indent=2) if as_json else f"{made.id} {made.tenant}/{made.name}")


@projects_app.command("list")
def list_projects(config: Config = None, as_json: AsJson = False) -> None:
    """List projects, archived ones too."""
    _show(_store(config).projects(), as_json, ("id", "tenant", "name", "created_at", "archived_at"))


@projects_app.command("archive")
def archive_project(project: ProjectName, config: Config = None, yes: Yes = False) -> None:
    """End a project: all of its keys are dead in 2 s, for ever. What belongs to it stays."""
    store = _store(config)
    found = store.project(*_split(project))
    owned = [key for key in store.all_keys() if (key.tenant, key.project) == (found.tenant, found.name)]
    live = sum(key.revoked_at is None for key in owned)
    ask(f"project {project} is archived, and its {live} keys are dead, for ever", yes=yes)
    store.archive_project(found)
    echo(f"{project} is archived", err=True)


def _access(config: Path | None) -> Access:
    return load_settings(config).access


def _store(config: Path | None) -> KeyStore:
    from hycluster.access.database import bring_up_to_date, open_database
    from hycluster.access.store import KeyStore

    engine = open_database(_access(config))
    bring_up_to_date(engine)
    return KeyStore(engine, f"cli {_user()}")


def _user() -> str:
    try:
        return getpass.getuser()
    # In a container its number may have no name.
    except (KeyError, OSError):
        return str(os.getuid())


def _split(project: str) -> tuple[str, str]:
    tenant, slash, name = project.partition("/")
    if not slash:
        raise InvalidInput(f"TENANT/PROJECT: {shown(project)} is not allowed; must be two names with a '/' in between")
    return tenant, name


def _span_s(option: str, said: str) -> int:
    found = _SPAN.fullmatch(said)
    if found is None:
        raise InvalidInput(f"{option}: {shown(said)} is not allowed; must be minutes, hours or days: 30m, 12h, 90d")
    return int(found[1]) * _UNIT_S[found[2]]


def _told(key: ApiKey) -> str:
    return f"key {key.id}, {key.name!r} of {key.tenant}/{key.project},"


def _show_secret(made: ApiKey, secret: str, as_json: bool) -> None:
    if as_json:
        echo(json.dumps({**asdict(made), "key": secret}, indent=2))
        return
    echo(f"{_told(made)} is shown this once:", err=True)
    echo(secret)


def _show(found: Sequence[Any], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.removesuffix("_at"), overflow="fold")
    for each in found:
        assert is_dataclass(each)
        table.add_row(*(_cell(name, getattr(each, name)) for name in columns))
    console().print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "all" if name == "models" else "-"
    if name == "at" or name.endswith("_at"):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%MZ")
    return json.dumps(value) if isinstance(value, dict) else ",".join(value) if isinstance(value, tuple) else str(value)
