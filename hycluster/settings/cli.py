"""``hycluster settings``: the keys of a settings file, and of a job, told to editors and to people."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hycluster.terminal import echo

app = typer.Typer(
    name="settings", help="Print what may be in a settings file: as a JSON schema, or as a page.", no_args_is_help=True
)


@app.callback()
def settings() -> None:
    """Print what may be in a settings file: as a JSON schema, or as a page."""


OfJob = Annotated[bool, typer.Option("--job", help="Of a batch job's file (jobs/*.yaml) instead.")]


@app.command()
def schema(context: typer.Context, of_job: OfJob = False) -> None:
    """Print the JSON schema of a settings file, for editors and other programs."""
    from hycluster.settings import schema as module

    made = module.settings_schema(context.obj) if of_job else module.settings_schema()
    echo(json.dumps(made, indent=2))


@app.command()
def reference(context: typer.Context, of_job: OfJob = False) -> None:
    """Print the reference of all settings, in Markdown: docs/settings.md, or docs/jobs.md."""
    from hycluster.settings import reference as module

    made = module.reference_page(context.obj, module.JOB_HEAD) if of_job else module.reference_page()
    echo(made, nl=False)
