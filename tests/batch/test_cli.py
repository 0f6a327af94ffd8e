from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hycluster.batch import run as run_module
from hycluster.batch.cli import Outside
from hycluster.batch.job import Job
from hycluster.batch.run import Engines
from hycluster.batch.task import Connect
from hycluster.cli import batch_app as app
from hycluster.errors import HyclusterError, JobFailed, SettingsError, TooManyQuarantined
from hycluster.settings.settings import Settings
from tests.batch.committed import commit_all, parts
from tests.batch.conftest import MakeJob
from tests.batch.stand_in import stand_in

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "jobs" / "summarize.yaml")


# What a job generates with: the job, the deployment, the Ray cluster's address.
Opened = tuple[Job, Settings | None, str | None]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Opened]:
    """Jobs that open their engines and do nothing else."""
    opened: list[Opened] = []

    def only_open(job: Job, engines: Engines, **_: Any) -> None:
        with engines(job):
            pass

    @contextmanager
    def open_stand_in(job: Job, settings: Settings | None, address: str | None) -> Iterator[Connect]:
        opened.append((job, settings, address))
        yield stand_in()

    def submitted(job_id: str, address: str, *, follow: bool, as_json: bool) -> int:
        raise AssertionError("nothing was submitted")

    monkeypatch.setattr(run_module, "run_job", only_open)
    monkeypatch.setattr(app.info, "context_settings", {"obj": Outside(open_stand_in, submitted)})
    return opened


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["run", *args])


def test_options_reach_the_job(ran: list[Opened]) -> None:
    result = invoke(JOB, "--input", "in", "--output", "out", "--set", "sampling.max_tokens=8", "--set", "name=x")
    assert result.exit_code == 0, result.output
    ((job, settings, address),) = ran
    assert (job.input.path, job.output.path, job.sampling.max_tokens, job.name) == ("in", "out", 8, "x")
    assert settings is None
    assert address is None


def test_the_address_is_that_of_the_engines(ran: list[Opened]) -> None:
    assert invoke(JOB, "--input", "in", "--output", "out", "--address", "127.0.0.1:7").exit_code == 0
    assert [address for _, _, address in ran] == ["127.0.0.1:7"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_overwrite_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    said: list[bool] = []
    monkeypatch.setattr(run_module, "run_job", lambda job, overwrite, **_: said.append(overwrite))
    assert invoke(JOB, "--input", "i", "--output", "o", *options).exit_code == 0
    assert said == [bool(options)]


def test_dedicated_engines_take_the_deployment(ran: list[Opened]) -> None:
    config = str(ROOT / "deployments" / "local.yaml")
    assert invoke(JOB, "--input", "i", "--output", "o", "--engine", "dedicated", "--config", config).exit_code == 0
    ((job, settings, _),) = ran
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
def test_wrong_use_is_one_line_and_exit_2(ran: list[Opened], args: list[str], said: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not ran


@pytest.mark.parametrize(
    ("error", "code"), [(JobFailed("x"), 1), (SettingsError("x"), 2), (TooManyQuarantined("x"), 3)]
)
def test_errors_become_exit_codes(monkeypatch: pytest.MonkeyPatch, error: HyclusterError, code: int) -> None:
    def fail(job: Job, **_: Any) -> None:
        raise error

    monkeypatch.setattr(run_module, "run_job", fail)
    result = invoke(JOB, "--input", "i", "--output", "o")
    assert result.exit_code == code
    assert result.stderr == "error: x\n"


def test_ctrl_c_says_what_is_lost(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(job: Job, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run_job", interrupted)
    out = commit_all(make_job(), first=2, finish=False)
    begun, new = invoke(JOB, "--input", "i", "--output", str(out)), invoke(JOB, "--input", "i", "--output", "o")
    assert (begun.exit_code, new.exit_code) == (130, 130)
    assert begun.stderr.startswith("stopped; 4 of 12 rows are committed, 0 more were answered: those of the last half")
    assert new.stderr == "stopped; nothing was committed and nothing is lost, the same command begins anew\n"


def test_verify_says_one_line_or_a_line_a_fault(make_job: MakeJob, corpus: Path, tmp_path: Path) -> None:
    out = commit_all(make_job())
    right = CliRunner().invoke(app, ["verify", str(out), "--input", str(corpus)])
    assert right.exit_code == 0, right.output
    assert right.stdout.startswith("verified: 12 rows, each exactly once: 12 in the output, 0 in the quarantine")
    for path in parts(out)[:2]:
        path.unlink()
    wrong = CliRunner().invoke(app, ["verify", str(out), "--input", str(corpus)])
    assert wrong.exit_code == 1
    assert [line.partition(":")[0] for line in wrong.stdout.splitlines()] == 2 * ["shard 0"] + 2 * ["shard 1"]
    for args in (["verify", str(tmp_path / "no"), "--input", str(corpus)], ["verify", str(out), "--input", "no"]):
        refused = CliRunner().invoke(app, args)
        assert refused.exit_code == 2
        assert refused.stderr.count("\n") == 1
        assert refused.stderr.startswith("error: ")


def test_status_and_report_read_an_output(make_job: MakeJob, tmp_path: Path) -> None:
    out = commit_all(make_job(), first=2, finish=False)
    for args, code, said in (
        (["status", str(out)], 0, "shards 2/7, rows 4/12"),
        (["status", str(out), "--json"], 0, '"shards_done": 2'),
        (["report", str(out)], 0, f"{out}/_report.html\n"),
        (["status", str(tmp_path / "no")], 2, "holds no output of a job"),
        (["report", str(tmp_path / "no")], 2, "holds no output of a job"),
    ):
        result = CliRunner().invoke(app, args)
        assert (result.exit_code, said in result.output) == (code, True), result.output
    assert (out / "_report.json").exists()


@pytest.mark.parametrize("command", [["verify", "--input", "in"], ["status"]])
def test_a_store_that_does_not_answer_is_one_line(command: list[str]) -> None:
    nowhere = "s3://KEY:SECRET@bucket/out?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    result = CliRunner().invoke(app, [command[0], nowhere, *command[1:]])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: OUTPUT: ")
    assert "can't be read: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert "SECRET" not in result.output
