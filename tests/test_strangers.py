"""What a command does where there is a Ray cluster that it was not told of: nothing, though Ray would find it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray._private import state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("some_ray")]


@pytest.mark.parametrize("command", [["upgrade"], ["chaos"], ["batch", "run", "JOB"]])
def test_nobody_elses_cluster_is_joined(tmp_path: Path, command: list[str]) -> None:
    job = {"name": "j", "model": "m", "task": "generate", "prompt": "{text}", "engine": "shared"}
    paths = {
        "input": {"path": str(tmp_path / "in.parquet"), "columns": {"text": "text"}},
        "output": {"path": str(tmp_path / "out")},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job | paths))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in.parquet")
    drivers, processes = joined(), ray_processes()
    assert processes
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hycluster",
            *(str(tmp_path / "job.yaml") if word == "JOB" else word for word in command),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"HYCLUSTER_HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        "error: --address: no cluster was named, and no running one was started from this HYCLUSTER"
    )
    assert joined() == drivers
    assert ray_processes() == processes


def ray_processes() -> set[tuple[int, float]]:
    """The two that this test's cluster stands on; workers come and go. Ray names its folder to each of them."""
    folder = str(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[attr-defined]
    found = set()
    for process in psutil.process_iter(["cmdline", "create_time"]):
        program, *arguments = process.info["cmdline"] or [""]
        if program.endswith(("gcs_server", "raylet")) and any(folder in word for word in arguments):
            found.add((process.pid, process.info["create_time"]))
    return found


def joined() -> set[str]:
    """Who has ever joined this test's cluster."""
    return {job["JobID"] for job in state.jobs()}
