from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hycluster.batch import run as run_module
from hycluster.batch.cli import app
from hycluster.batch.job import Job
from hycluster.config import Settings
from hycluster.errors import HyclusterError, JobFailed, SettingsError, TooManyQuarantined

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "jobs" / "summarize.yaml")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, Settings | None]]:
    calls: list[tuple[Job, Settings | None]] = []
    monkeypatch.setattr(run_module, "run_job", lambda job, settings: calls.append((job, settings)))
    return calls


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["run", *args])


def test_options_reach_the_job(ran: list[tuple[Job, Settings | None]]) -> None:
    result = invoke(JOB, "--input", "in", "--output", "out", "--set", "sampling.max_tokens=8", "--set", "name=x")
    assert result.exit_code == 0, result.output
    ((job, settings),) = ran
    assert (job.input.path, job.output.path, job.sampling.max_tokens, job.name) == ("in", "out", 8, "x")
    assert settings is None


def test_dedicated_engines_take_the_deployment(ran: list[tuple[Job, Settings | None]]) -> None:
    config = str(ROOT / "deployments" / "local.yaml")
    assert invoke(JOB, "--input", "i", "--output", "o", "--engine", "dedicated", "--config", config).exit_code == 0
    ((job, settings),) = ran
    assert job.engine == "dedicated"
    assert settings is not None
    assert settings.model(job.model).name == job.model


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere.yaml"], "error: nowhere.yaml: no such file"),
        ([JOB, "--output", "o"], "input.path: not set"),
        ([JOB, "--input", "i", "--output", "o", "--engine", "mine"], "engine: 'mine' is not allowed"),
        ([JOB, "--input", "i", "--output", "o", "--set", "nonsense"], "'nonsense' must be of the form KEY=VALUE"),
        ([JOB, "--input", "i", "--output", "o", "--engine", "dedicated", "--config", "no.yaml"], "no.yaml: no such"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(ran: list[tuple[Job, Settings | None]], args: list[str], said: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not ran


@pytest.mark.parametrize(
    ("error", "code"), [(JobFailed("x"), 1), (SettingsError("x"), 2), (TooManyQuarantined("x"), 3)]
)
def test_errors_become_exit_codes(monkeypatch: pytest.MonkeyPatch, error: HyclusterError, code: int) -> None:
    def fail(job: Job, settings: Settings | None) -> None:
        raise error

    monkeypatch.setattr(run_module, "run_job", fail)
    result = invoke(JOB, "--input", "i", "--output", "o")
    assert result.exit_code == code
    assert result.stderr == "error: x\n"
