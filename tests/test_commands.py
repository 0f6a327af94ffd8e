"""The commands are a contract; their names do not follow those of the functions."""

from __future__ import annotations

from typing import Any

from typer.main import get_command

from hycluster.cli import app

COMMANDS = {
    "batch cancel", "batch jobs", "batch logs", "batch report", "batch run", "batch status", "batch submit",
    "batch verify", "chaos", "doctor", "k8s check", "k8s render", "k8s values", "metrics reference", "metrics render",
    "metrics rules", "plan", "serve", "settings reference", "settings schema", "simulate", "status", "summarize",
    "tiny-model", "top", "upgrade", "why",
}  # fmt: skip


def paths(command: Any, path: tuple[str, ...] = ()) -> set[str]:
    inner = getattr(command, "commands", {})
    return set().union(*(paths(each, (*path, name)) for name, each in inner.items())) if inner else {" ".join(path)}


def test_every_command_has_its_name() -> None:
    assert paths(get_command(app)) == COMMANDS
