"""The commands are a contract; their names do not follow those of the functions."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hycluster.cli import app

COMMANDS = {
    "batch cancel", "batch jobs", "batch logs", "batch report", "batch run", "batch status", "batch submit",
    "batch verify", "chaos", "doctor", "k8s check", "k8s render", "k8s values", "keys audit", "keys create",
    "keys list", "keys migrate", "keys revoke", "keys rotate", "limits list", "limits remove", "limits set",
    "metrics reference", "metrics render", "metrics rules", "plan", "projects archive", "projects create",
    "projects list", "serve", "settings reference", "settings schema", "simulate", "status", "summarize", "tiny-model",
    "top", "upgrade", "usage", "why",
}  # fmt: skip


def paths(command: Any, path: tuple[str, ...] = ()) -> set[str]:
    inner = getattr(command, "commands", {})
    return set().union(*(paths(each, (*path, name)) for name, each in inner.items())) if inner else {" ".join(path)}


def test_every_command_has_its_name() -> None:
    assert paths(get_command(app)) == COMMANDS


@pytest.mark.parametrize("command", [[], ["serve"], ["batch", "run"]])
def test_help_is_a_letter_too(command: list[str]) -> None:
    said = CliRunner().invoke(app, [*command, "-h"])
    assert said.exit_code == 0
    assert "Usage: " in said.output


def test_the_shell_completes_commands() -> None:
    asked = {"_HYCLUSTER_COMPLETE": "complete_bash", "COMP_WORDS": "hycluster batch st", "COMP_CWORD": "2"}
    assert CliRunner().invoke(app, [], env=asked, prog_name="hycluster").output.split() == ["status"]
