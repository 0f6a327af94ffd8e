"""``hycluster settings``: the settings told to editors and to people."""

from __future__ import annotations

import json

import typer

app = typer.Typer(name="settings", help="What may be in a settings file.", no_args_is_help=True)


@app.callback()
def settings() -> None:
    """What may be in a settings file."""


@app.command()
def schema() -> None:
    """Print the JSON schema of a settings file, for editors and other programs."""
    from hycluster.settings import schema as module

    typer.echo(json.dumps(module.settings_schema(), indent=2))


@app.command()
def reference() -> None:
    """Print the reference of all settings, in Markdown: docs/settings.md."""
    from hycluster.settings import reference as module

    typer.echo(module.reference_page(), nl=False)
