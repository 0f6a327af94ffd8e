from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hycluster.doctor import cli
from hycluster.doctor.finding import Finding, bad, ok, warn

RUNNER = CliRunner()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> typer.Typer:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(cli.doctor)
    return app


def found(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(cli, "findings", lambda settings, address: list(findings))


def test_a_line_for_each_with_what_to_do(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, ok("CPU", "2 cores"), warn("clock", "[unset]", "run chrony"), bad("ports", "8000", "stop it"))
    done = RUNNER.invoke(app)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "ok   CPU: 2 cores",
        "warn clock: [unset]",
        "      -> run chrony",
        "bad  ports: 8000",
        "      -> stop it",
        "1 bad, 1 to look at",
    ]


def test_exit_codes_and_json(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, ok("CPU", "2 cores"))
    assert RUNNER.invoke(app).stdout.splitlines()[-1] == "all is well"
    found(monkeypatch, ok("CPU", "2 cores"), warn("clock", "unset", "run chrony"))
    done = RUNNER.invoke(app, ["--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["findings"][1] == {
        "name": "clock",
        "verdict": "warn",
        "what": "unset",
        "todo": "run chrony",
    }


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All looks are made, and none of them breaks."""
    from hycluster.settings.read import load_settings

    monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = [each.name for each in cli.findings(load_settings(None, ["http.port=0", "grpc.port=0"]), None)]
    assert {"versions", "CPU", "GPUs", "memory", "clock", "ports", "Ray", "batches.store"} <= set(names)
