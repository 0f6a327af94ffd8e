"""The commands as `hycluster` runs them, errors included."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from hycluster import cli
from hycluster.errors import Unauthenticated
from hycluster.submit import job_api
from hycluster.submit.submission import Submission
from hycluster.submit.submitted import Submitted

ROOT = Path(__file__).parents[2]
JOB = str(ROOT / "jobs" / "generate.yaml")
URL = "http://head:8265"
PATHS = ("--input", "s3://b/in", "--output", "s3://b/out")


@dataclass
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def hycluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["hycluster", "batch", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        return Done(code, said.out, said.err)

    return run


class FakeApi:
    """The cluster of a test: `now` is what became of any job."""

    now = Submitted("nightly-1", "finished", "nightly", "s3://b/out", 0, 1_700_000_000.0, 1_700_000_060.0)
    sent: Submission | None = None
    said = "Running entrypoint\nnightly: 3/9 rows\n"

    def __init__(self, address: str) -> None:
        assert address == URL

    def submit(self, submission: Submission) -> None:
        FakeApi.sent = submission

    def look(self, job_id: str) -> Submitted:
        return self.now

    def jobs(self) -> list[Submitted]:
        return [self.now, Submitted("b-2", "waiting")]

    def log(self, job_id: str) -> str:
        return self.said

    def follow(self, job_id: str, write: Callable[[str], None]) -> Submitted:
        write(self.said)
        return self.now

    def wait(self, job_id: str, changed: Callable[[Submitted], None]) -> Submitted:
        changed(self.now)
        return self.now

    def cancel(self, job_id: str) -> tuple[bool, Submitted]:
        return not self.now.ended, Submitted(job_id, "cancelled") if not self.now.ended else self.now


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.setattr(job_api, "JobApi", FakeApi)
    monkeypatch.setattr(FakeApi, "now", FakeApi.now)
    monkeypatch.setattr(FakeApi, "sent", None)
    return FakeApi


def test_submit_prints_the_id_alone(hycluster: Run, api: type[FakeApi]) -> None:
    done = hycluster("submit", JOB, *PATHS, "--address", URL, "--set", "sampling.max_tokens=8", "--overwrite", "--yes")
    assert api.sent is not None
    assert (done.code, done.out) == (0, f"{api.sent.id}\n")
    assert f"status|logs|cancel {api.sent.id} --address {URL}" in done.err
    assert api.sent.command.startswith("exec hycluster batch run /dev/fd/3 --overwrite --yes 3<<'JOB'\n")
    assert "max_tokens: 8" in api.sent.command


def test_an_output_is_not_deleted_unasked(hycluster: Run, api: type[FakeApi]) -> None:
    done = hycluster("submit", JOB, *PATHS, "--address", URL, "--overwrite")
    assert (done.code, done.out, api.sent) == (2, "", None)
    assert "is deleted if it is the output of another job or input\nerror: --yes: must be given" in done.err


@pytest.mark.parametrize("command_exit", [0, 1, 2, 3])
def test_who_waits_exits_as_the_job_does(hycluster: Run, api: type[FakeApi], command_exit: int) -> None:
    api.now = Submitted("x", "failed" if command_exit else "finished", command_exit=command_exit)
    done = hycluster("submit", JOB, *PATHS, "--address", URL, "--wait")
    assert done.code == command_exit
    assert api.sent is not None
    assert done.out == f"{api.sent.id}\n"
    assert api.said in done.err
    for command in (["status", "x"], ["status", "x", "--follow"], ["logs", "x", "--follow"]):
        assert hycluster(*command, "--address", URL).code == command_exit


def test_who_stops_waiting_leaves_the_job_alone(
    hycluster: Run, api: type[FakeApi], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: FakeApi, job_id: str, write: Callable[[str], None]) -> Submitted:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeApi, "follow", interrupted)
    done = hycluster("submit", JOB, *PATHS, "--address", URL, "--wait")
    assert done.code == 130
    assert "the job goes on; hycluster batch cancel" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([JOB, *PATHS], "--address: give either Ray's dashboard"),
        ([JOB, *PATHS, "--address", URL, "--kubernetes"], "--address: give either"),
        ([JOB, *PATHS, "--address", URL, "--dry-run"], "--dry-run: only allowed with --kubernetes"),
        ([JOB, *PATHS, "--address", URL, "--cluster", "x"], "--cluster: only allowed with --kubernetes"),
        ([JOB, *PATHS, "--kubernetes", "--wait"], "--wait: not allowed with --kubernetes"),
        (
            [JOB, *PATHS, "--kubernetes", "--engine", "shared"],
            "engine: 'shared' is not allowed in a cluster of the job's",
        ),
        ([JOB, *PATHS, "--address", URL, "--set", "sampling.max_token=8"], "sampling.max_token"),
        ([JOB, "--input", "corpus", "--output", "s3://b/o", "--address", URL], "input.path: 'corpus' is relative"),
        (["nowhere.yaml", *PATHS, "--address", URL], "nowhere.yaml: no such file"),
        ([JOB, *PATHS, "--address", URL, "--engine", "dedicated", "--config", "no.yaml"], "no.yaml: no such file"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_sent(
    hycluster: Run, api: type[FakeApi], arguments: list[str], said: str
) -> None:
    done = hycluster("submit", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert api.sent is None


def test_errors_of_the_cluster_are_one_line(hycluster: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise Unauthenticated("RAY_AUTH_TOKEN: not set")

    monkeypatch.setattr(job_api, "JobApi", refuse)
    for command in (["status", "x"], ["logs", "x"], ["cancel", "x"], ["jobs"], ["submit", JOB, *PATHS]):
        done = hycluster(*command, "--address", URL)
        assert (done.code, done.out, done.err) == (2, "", "error: RAY_AUTH_TOKEN: not set\n")


def test_a_ray_job_is_printed(hycluster: Run) -> None:
    done = hycluster("submit", JOB, *PATHS, "--kubernetes", "--dry-run", "--namespace", "ml")
    assert done.code == 0
    made = yaml.safe_load(done.out)
    assert (made["kind"], made["metadata"]["namespace"]) == ("RayJob", "ml")
    assert "engine: dedicated\n" in made["spec"]["entrypoint"]
    assert done.err.startswith("note: engine: not set")
    shared = hycluster("submit", JOB, *PATHS, "--kubernetes", "--dry-run", "--cluster", "serving")
    assert (shared.code, shared.err) == (0, "")
    assert yaml.safe_load(shared.out)["spec"]["clusterSelector"] == {"ray.io/cluster": "serving"}


def test_a_ray_job_is_applied(hycluster: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/given\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = hycluster("submit", JOB, *PATHS, "--kubernetes", "--cluster", "serving")
    assert done.code == 0
    assert yaml.safe_load((tmp_path / "given").read_text())["metadata"]["name"] == done.out.strip()
    assert f"kubectl delete rayjob {done.out.strip()}" in done.err


def test_status_tells_what_is_known(hycluster: Run, api: type[FakeApi]) -> None:
    done = hycluster("status", "nightly-1", "--address", URL)
    assert done.out.splitlines() == [
        "id       nightly-1",
        "job      nightly",
        "state    finished",
        "started  2023-11-14 22:13:20 UTC",
        "for      0:01:00",
        "output   s3://b/out",
    ]
    told = json.loads(hycluster("status", "nightly-1", "--address", URL, "--json").out)
    assert (told["state"], told["exit_code"], told["output"]) == ("finished", 0, "s3://b/out")
    api.now = Submitted("nightly-1", "running")
    done = hycluster("status", "nightly-1", "--address", URL)
    assert (done.code, done.out.splitlines()[-1]) == (0, "says     nightly: 3/9 rows")
    api.now = Submitted("nightly-1", "failed", command_exit=2, reason="input.path: is empty")
    done = hycluster("status", "nightly-1", "--address", URL, "--follow")
    assert done.out == "nightly-1: refused: job, input or output; nothing was done (input.path: is empty)\n"


def test_jobs_are_listed(hycluster: Run, api: type[FakeApi]) -> None:
    lines = hycluster("jobs", "--address", URL).out.splitlines()
    assert [line.split()[:2] for line in lines] == [["JOB_ID", "STATE"], ["nightly-1", "finished"], ["b-2", "waiting"]]
    assert lines[1].endswith("s3://b/out")
    assert [job["id"] for job in json.loads(hycluster("jobs", "--address", URL, "--json").out)] == ["nightly-1", "b-2"]


def test_logs_and_cancel(hycluster: Run, api: type[FakeApi]) -> None:
    assert hycluster("logs", "nightly-1", "--address", URL).out == api.said
    done = hycluster("cancel", "nightly-1", "--address", URL)
    assert (done.code, done.out) == (0, "nightly-1 had ended: finished\n")
    api.now = Submitted("nightly-1", "running", output="s3://b/out")
    done = hycluster("cancel", "nightly-1", "--address", URL)
    assert (done.code, done.out) == (2, "")
    assert f"nightly-1 at {URL}, running, writes to s3://b/out: it is stopped\nerror: --yes: must" in done.err
    done = hycluster("cancel", "nightly-1", "--address", URL, "--yes")
    assert (done.code, done.out) == (0, "nightly-1: cancelled; the same submit goes on where it stopped\n")
