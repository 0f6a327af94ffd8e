"""Before something is disturbed or destroyed: what it is, and whether to go on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hycluster.errors import SettingsError
from hycluster.terminal import echo

REFUSED = 1
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")]


def ask(what: str, *, yes: bool) -> None:
    """Say what is about to be done to what; returns if that is wanted.

    Raises:
        SettingsError: there is no terminal to ask at, and ``yes`` is not set.
        typer.Exit: it is not wanted.
    """
    echo(what, err=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise SettingsError("--yes: must be given where there is no terminal to ask at; nothing was changed")
    echo("Go on? [y/N] ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        echo("nothing was changed", err=True)
        raise typer.Exit(REFUSED)
