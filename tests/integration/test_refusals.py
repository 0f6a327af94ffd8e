"""What can't work is refused in one clear line, soon, and what runs goes on running."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hycluster.cli import app
from hycluster.client import Client
from hycluster.core import Sampling
from tests.integration.conftest import MODEL, Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def command(*arguments: str, timeout_s: float = 150, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hycluster", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **env},
    )


def only_error(said: str) -> str:
    """The one line that starts with ``error:``; there is nothing beside it but what the command says it does."""
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("serve", "--http-port", str(port), "--grpc-port", "0", timeout_s=30)
    assert done.returncode == 2
    assert only_error(done.stderr) == f"error: http.port: {port} on 127.0.0.1 can't be opened: Address already in use"


@pytest.mark.parametrize("arguments", [["serve"], ["batch", "run", "jobs/summarize.yaml"]])
def test_no_ray_at_the_address(arguments: list[str], tmp_path: Path) -> None:
    if arguments[0] == "batch":
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
        arguments = [*arguments, "--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out")]
    else:
        arguments = [*arguments, "--http-port", "0", "--grpc-port", "0"]
    done = command(*arguments, timeout_s=60, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    refused = "error: RAY_ADDRESS: no Ray cluster at '127.0.0.1:1': [Errno 111] Connection refused"
    assert only_error(done.stderr) == refused


def test_engine_that_can_not_start_ends_serve(tmp_path: Path, tiny_model: Path) -> None:
    model = {"name": "m", "source": str(tiny_model), "hardware": {"cpus": 0.1, "kv_cache_gib": 9000}}
    path = tmp_path / "settings.yaml"
    # Memory may be free later, so it is tried again until then; no request has ever succeeded.
    settings = {"models": [model], "http": {"port": 0}, "grpc": {"port": 0}, "start_timeout_s": 40}
    path.write_text(json.dumps(settings))
    done = command("serve", str(path))
    assert done.returncode == 1
    error = only_error(done.stderr)
    assert "start_timeout_s: no model could be served after 40 s: m: " in error
    assert "not started: model m: a replica did not start: " in done.stderr
    assert "the engine did not start" in error
    assert "9000" in error
    assert "ready" not in done.stdout


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"hardware": {"cpus": 400}}, 2, "hardware.cpus: all replicas together ask for 400 CPUs; this Ray cluster has"),
        ({"hardware": {"accelerator": "H20"}}, 2, "hardware.accelerator: all replicas together ask for 1 GPUs"),
        ({"engine": {"max_model_length": 5}}, 2, "engine.max_model_length: vLLM's engine has no such argument"),
        ({"hardware": {"cpus": 0.1, "kv_cache_gib": 9000}}, 1, "the engine did not start"),
        ({"source": "/no/such/folder"}, 2, "source: '/no/such/folder': no such folder"),
    ],
)
def test_dedicated_engines_that_can_not_start(
    served: Served, tiny_model: Path, tmp_path: Path, change: dict[str, Any], code: int, says: str
) -> None:
    """The command is run in this process, which has joined the cluster; as one of its own it is the test below."""
    model = {"name": "m", "source": str(tiny_model), "hardware": {"cpus": 0.1}} | change
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"models": [model], "data_plane": {"host": "127.0.0.1"}}))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    arguments = [
        "batch", "run", "jobs/summarize.yaml", "--set", "model=m", "--input", str(tmp_path / "in.parquet"),
        "--output", str(tmp_path / "out"), "--engine", "dedicated", "--config", str(settings),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, says in only_error(done.stderr)) == (code, True), done.stderr
    with Client(served.grpc) as client:
        answer = client.generate(model=MODEL, prompt="hello", sampling=Sampling(max_tokens=2))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_model_that_is_not_served(served: Served, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    done = command(
        "batch", "run", "jobs/summarize.yaml", "--set", "model=nope",
        "--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "model: 'nope' is not served here" in only_error(done.stderr)
    assert not (tmp_path / "out").exists()
