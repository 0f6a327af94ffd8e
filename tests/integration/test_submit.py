"""Jobs submitted to a real Ray head with its dashboard, token and job API; a stand-in answers for the engines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.batch.conftest import write_texts
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
# A head, until its standard input is closed.
HEAD = """
import ray, sys
context = ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
print(f"http://{context.dashboard_url}", flush=True)
sys.stdin.read()
ray.shutdown()
"""
JOB: dict[str, Any] = {
    "name": "Night.ly",
    "model": "stand-in",
    "task": "generate",
    "prompt": "{text}",
    "sampling": {"max_tokens": 8},
    "shard_rows": 2,
    "rows_in_flight": 4,
    "max_quarantined_fraction": 0.1,
}


@dataclass
class Head:
    """A cluster, and the command line of somebody elsewhere."""

    address: str
    job: Path

    def hycluster(self, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        if token is not None:
            env["RAY_AUTH_TOKEN"] = token
        # What Ray's client would prefer to --address.
        env["RAY_ADDRESS"] = "http://127.0.0.1:9"
        return subprocess.run(
            [sys.executable, "-m", "hycluster", "batch", *arguments, "--address", self.address],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env=env,
        )

    def submit(self, corpus: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return self.hycluster("submit", str(self.job), "--input", str(corpus), "--output", str(output), *more)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    (folder / "job.yaml").write_text(json.dumps(JOB))
    # The command that an image has on its PATH.
    command = folder / "hycluster"
    command.write_text(f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m tests.integration.submitted_driver "$@"\n')
    command.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{folder}:{env['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    # Between its signal and SIGKILL; 3 s are not much on a busy machine.
    env["RAY_JOB_STOP_WAIT_TIME_S"] = "60"
    with (
        (folder / "head.log").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", HEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        ) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            assert address, (folder / "head.log").read_text()
            yield Head(address, folder / "job.yaml")
        finally:
            process.send_signal(signal.SIGTERM)


def records(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "_shards").glob("0*.json"))


def test_a_cancelled_job_is_resumed_by_the_same_submit(head: Head, tmp_path: Path) -> None:
    down, corpus, output = tmp_path / "down", tmp_path / "corpus", tmp_path / "out"
    down.touch()
    # One row can't be answered before the engines are up again; those before it are committed.
    write_texts(corpus / "a.parquet", [f"die {down}" if n == 12 else f"text {n}" for n in range(20)])
    done = head.submit(corpus, output)
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.strip()
    assert job_id.startswith("night-ly-")
    assert f"note: input.path: '{corpus}' is a path on the cluster's nodes" in done.stderr
    eventually(lambda: len(records(output)) >= 3, 120, "some shards are committed")

    running = head.hycluster("status", job_id, "--json")
    told = json.loads(running.stdout)
    assert (running.returncode, told["state"], told["name"]) == (0, "running", "Night.ly")
    assert told["output"] == str(output)

    cancelled = head.hycluster("cancel", job_id)
    assert cancelled.stdout == f"{job_id}: cancelled; the same submit goes on where it stopped\n"
    assert head.hycluster("status", job_id).returncode == 1
    # It was asked first: the lease is given back, and the next run need not wait for it to expire.
    assert head.hycluster("logs", job_id).stdout.endswith("stopped; the same command goes on from here\n")
    assert not list((output / "_coordinator").glob("*.json"))
    kept = {name: (output / "_shards" / name).read_bytes() for name in records(output)}
    assert kept
    assert not (output / "_SUCCESS").exists()

    down.unlink()
    resumed = head.submit(corpus, output, "--wait")
    assert resumed.returncode == 0, resumed.stderr
    second = resumed.stdout.strip()
    assert second != job_id
    assert resumed.stderr.endswith(f"note: {second}: finished\n")
    assert (output / "_SUCCESS").exists()
    assert kept.items() <= {name: (output / "_shards" / name).read_bytes() for name in records(output)}.items()
    # What a worker committed on its last way counts too.
    earlier = re.search(r"of these done earlier │ +(\d+)", resumed.stderr)
    assert earlier is not None
    assert int(earlier[1]) >= JOB["shard_rows"] * len(kept)

    listed = json.loads(head.hycluster("jobs", "--json").stdout)
    assert [(job["id"], job["state"]) for job in listed] == [(second, "finished"), (job_id, "cancelled")]


def test_the_exit_code_is_that_of_the_job(head: Head, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_texts(corpus / "a.parquet", ["refuse this"] * 4)
    done = head.submit(corpus, tmp_path / "out", "--wait")
    assert done.returncode == 3, done.stderr
    job_id = done.stdout.strip()
    again = head.hycluster("status", job_id)
    assert again.returncode == 3
    assert "reason   max_quarantined_fraction: " in again.stdout
    assert head.hycluster("cancel", job_id).stdout.startswith(f"{job_id} had ended: more rows quarantined")


@pytest.mark.parametrize(
    ("token", "command", "said"),
    [
        (None, ["jobs"], "RAY_AUTH_TOKEN: not set; "),
        ("f" * 64, ["jobs"], "RAY_AUTH_TOKEN: 'http"),
        (TOKEN, ["status", "nope"], "JOB_ID: 'nope' is not known"),
        (TOKEN, ["logs", "nope", "--follow"], "JOB_ID: 'nope' is not known"),
        (TOKEN, ["cancel", "nope"], "JOB_ID: 'nope' is not known"),
    ],
)
def test_what_the_cluster_refuses_is_one_line(head: Head, token: str | None, command: list[str], said: str) -> None:
    done = head.hycluster(*command, token=token)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
