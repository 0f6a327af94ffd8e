"""``hycluster projects``: what keys are of, and files, batches and responses belong to."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer

from hycluster.consent import Yes, ask
from hycluster.tenants.acted_on import DEFAULT_TENANT, Config, TenantName, store_of
from hycluster.tenants.printed import AsJson, print_records, utc_minute
from hycluster.terminal import echo

projects_app = typer.Typer(name="projects", help="Make, list and archive projects, which keys are of.",
                           no_args_is_help=True)  # fmt: skip
Name = Annotated[str, typer.Argument(metavar="PROJECT")]


@projects_app.command("create")
def create_project(
    project: Name, tenant: TenantName = DEFAULT_TENANT, config: Config = None, as_json: AsJson = False
) -> None:
    """Make a project of a tenant. Its name is given once, for ever."""
    made = store_of(config).create_project(tenant, project)
    echo(json.dumps(asdict(made), indent=2) if as_json else f"{made.id} {made.tenant}/{made.name}")


@projects_app.command("list")
def list_projects(config: Config = None, as_json: AsJson = False) -> None:
    """List projects, archived ones too."""
    print_records(store_of(config).projects(), as_json, ("id", "tenant", "name", "title", "created_at", "archived_at"))


@projects_app.command("archive")
def archive_project(
    project: Name, tenant: TenantName = DEFAULT_TENANT, config: Config = None, yes: Yes = False
) -> None:
    """End a project: all of its keys are dead in 2 s, for ever. What belongs to it stays."""
    store = store_of(config)
    found = store.project(tenant, project)
    if found.archived_at is not None:
        echo(f"{tenant}/{project} was archived already, at {utc_minute(found.archived_at)}", err=True)
        return
    owned = [key for key in store.all_keys() if (key.tenant, key.project) == (found.tenant, found.name)]
    now_s = time.time()
    live = sum(key.revoked_at is None and (key.expires_at or now_s + 1) > now_s for key in owned)
    ask(f"project {tenant}/{project} will be archived, and its {live} keys dead, for ever", yes=yes)
    store.archive_project(found)
    echo(f"{tenant}/{project} is archived", err=True)
