"""Jobs submitted to a real Ray head with its dashboard, token and job API; a stand-in answers for the engines."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.batch.conftest import write_texts
from tests.integration.conftest import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
START_ATTEMPTS = 3
TOKEN = "0123456789abcdef" * 4
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
    # Ray's sockets are below, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        for attempt in range(START_ATTEMPTS):
            # Ray gives a node 30 s to start, which a busy machine may not keep.
            with ray_head(Path(ray_folder) / str(attempt), folder / "head.log", env) as address:
                if address is not None:
                    yield Head(address, folder / "job.yaml")
                    return
        raise AssertionError((folder / "head.log").read_text())


@contextmanager
def ray_head(ray_folder: Path, log: Path, env: dict[str, str]) -> Iterator[str | None]:
    """A head of its own, with ports that nobody else has; yields the dashboard's address, None if it did not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port=0", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0", "--num-cpus=2"]
    options += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", f"--temp-dir={ray_folder}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
    with (
        log.open("a") as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=env, start_new_session=True) as process,
    ):
        try:
            yield f"http://127.0.0.1:{port}" if answers(port, process) else None
        finally:
            # What it has started ends with it.
            os.killpg(process.pid, signal.SIGKILL)


def answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait for the job API, or for the end of the head."""
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            answer = httpx.get(
                f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10
            )
            if answer.status_code == 200:
                return True
        time.sleep(0.2)
    return False


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

    cancelled = head.hycluster("cancel", job_id, "--yes")
    assert cancelled.stdout == f"{job_id}: cancelled; the same submit goes on where it stopped\n"
    assert head.hycluster("status", job_id).returncode == 1
    # It was asked first: the lease is given back, and the next run need not wait for it to expire.
    assert "\nstopped; the same command goes on from here\n" in head.hycluster("logs", job_id).stdout
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


def test_the_exit_code_and_the_reason_are_those_of_the_job(head: Head, tmp_path: Path) -> None:
    done = head.submit(tmp_path / "nowhere", tmp_path / "out", "--wait")
    assert done.returncode == 2, done.stderr
    job_id = done.stdout.strip()
    again = head.hycluster("status", job_id)
    assert again.returncode == 2
    assert f"reason   input.path: '{tmp_path}/nowhere': no such file or folder\n" in again.stdout
    assert head.hycluster("cancel", job_id, "--yes").stdout.startswith(f"{job_id} had ended: refused")


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
