"""``hycluster keys``: API keys, made, listed, revoked and replaced."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hycluster.consent import Yes, ask
from hycluster.tenants.acted_on import (
    DEFAULT_TENANT,
    Config,
    ProjectName,
    TenantName,
    database_of,
    project_or_new,
    store_of,
)
from hycluster.tenants.printed import AsJson, print_records, typed_span_s, utc_minute
from hycluster.terminal import echo

if TYPE_CHECKING:
    from hycluster.auth.store import ApiKey, KeyStore

keys_app = typer.Typer(name="keys", help="Make, list, revoke and replace API keys.", no_args_is_help=True)

SCOPES = (
    "batch: files, batches, batch priority. admin: all beside the models. priority: the service tier."
    " adapters: load and unload adapters of the project."
)
CERTIFICATE = (
    "No key: let in whoever shows a client certificate with this name, as 'URI:spiffe://...', 'DNS:...' or"
    " 'subject:CN=...'; see auth.tls.clients."
)
KeyId = Annotated[
    str,
    typer.Argument(metavar="ID", help="As 'hycluster keys list' says: key_...; or the key itself, as one that leaked."),
]


@keys_app.command("create")
def create_key(
    project: ProjectName,
    tenant: TenantName = DEFAULT_TENANT,
    name: Annotated[str, typer.Option(metavar="NAME", help="What the key is for.")] = "key",
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A model or adapter it may use; repeatable. Default: all.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help=SCOPES),
    ] = None,
    expires: Annotated[str | None, typer.Option(metavar="SPAN", help="From now on, such as 12h or 90d.")] = None,
    certificate: Annotated[str | None, typer.Option(metavar="NAME", help=CERTIFICATE)] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, or let in a certificate. A key is shown this once; only its SHA-256 is kept. A project
    that is not there is made."""
    from hycluster.auth.certificate import check_certificate_name

    ends_at = None if expires is None else int(time.time()) + typed_span_s("--expires", expires)
    store = store_of(config)
    store.check_key(name, scope or ())
    if certificate is not None:
        check_certificate_name(certificate)
    owner = project_or_new(store, tenant, project)
    if certificate is not None:
        let_in = store.let_in(owner, name, certificate, models=model, scopes=scope or (), expires_at=ends_at)
        echo(json.dumps(asdict(let_in), indent=2) if as_json else f"{let_in.id} {certificate}")
        return
    made, secret = store.create_key(owner, name, models=model, scopes=scope or (), expires_at=ends_at)
    _show_secret(made, secret, as_json)


@keys_app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of it.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of it.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List keys, without what is secret of them; revoked ones too."""
    found = [
        key for key in store_of(config).all_keys() if project in (None, key.project) and tenant in (None, key.tenant)
    ]
    columns = ("id", "tenant", "project", "name", "models", "scopes", "certificate", "expires_at", "revoked_at")
    print_records(found, as_json, columns)


@keys_app.command("revoke")
def revoke_key(key_id: KeyId, config: Config = None, yes: Yes = False) -> None:
    """Revoke a key: in 2 s it lets nobody in any more, at any ingress process, for ever. Asks at a terminal."""
    store = store_of(config)
    key = _named(store, key_id)
    if key.revoked_at is not None:
        echo(f"{_told(key)} was revoked already, at {utc_minute(key.revoked_at)}", err=True)
        return
    # It ends the one thing that it names: who revokes a leaked key by a script is not to be held up.
    ask(f"{_told(key)} will be revoked, for ever", yes=yes or not sys.stdin.isatty())
    store.revoke_key(key.id)
    echo(f"{key.id} is revoked", err=True)


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
    overlap_s = 0 if keep is None else typed_span_s("--keep", keep)
    store = store_of(config)
    key = _named(store, key_id)
    ask(f"{_told(key)} will get a successor and end {f'in {keep}' if keep else 'now'}, for ever", yes=yes)
    _show_secret(*store.rotate_key(key.id, overlap_s=overlap_s), as_json)


@keys_app.command("migrate")
def migrate_keys(config: Config = None) -> None:
    """Bring the database of keys to this version; ``hycluster serve`` does it too."""
    from hycluster.auth.database import bring_up_to_date

    changed = bring_up_to_date(database_of(config))
    echo("the database of keys is now of this version" if changed else "the database of keys is of this version")


@keys_app.command("audit")
def show_audit(config: Config = None, as_json: AsJson = False) -> None:
    """List every change of keys and projects: when, who, what."""
    print_records(store_of(config).audit(), as_json, ("at", "actor", "action", "subject", "detail"))


def _named(store: KeyStore, said: str) -> ApiKey:
    """By its id, or by itself: of a key that was found somewhere nobody knows the id."""
    from hycluster.auth.api_key import PREFIX

    return store.key_itself(said) if said.startswith(PREFIX) else store.key(said)


def _told(key: ApiKey) -> str:
    return f"key {key.id}, {key.name!r} of {key.tenant}/{key.project},"


def _show_secret(made: ApiKey, secret: str, as_json: bool) -> None:
    if as_json:
        echo(json.dumps({**asdict(made), "key": secret}, indent=2))
        return
    ends = "" if made.expires_at is None else f" ends at {utc_minute(made.expires_at)} and"
    echo(f"{_told(made)}{ends} is shown this once:", err=True)
    echo(secret)
