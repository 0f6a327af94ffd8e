"""Which engines a job gets: where its first rows go, before any engine is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from hycluster import cluster, first_rows, job_engines
from hycluster.batch.job import Job
from hycluster.directory import directory as directory_module
from hycluster.directory.directory import IngressReport

HERE, ELSEWHERE = "node-1", "node-2"
OWN = "by a gateway of its own"


class Remote:
    """Stands for an actor's method."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def remote(self) -> Any:
        return self._value


@pytest.mark.parametrize(
    ("ingresses", "way"),
    [
        ([], OWN),
        ([IngressReport(ELSEWHERE, "elsewhere:1", everywhere=False)], OWN),
        ([IngressReport(ELSEWHERE, "elsewhere:1", everywhere=True)], "elsewhere:1"),
        (
            [IngressReport(ELSEWHERE, "elsewhere:1", everywhere=True), IngressReport(HERE, "here:1", everywhere=False)],
            "here:1",
        ),
    ],
)
def test_the_first_rows_go_by_an_ingress_that_is_reached(
    monkeypatch: pytest.MonkeyPatch, ingresses: list[IngressReport], way: str
) -> None:
    found = SimpleNamespace(models=Remote(["m"]), ingresses=Remote(ingresses))
    monkeypatch.setattr(cluster, "join_cluster", lambda address: None)
    monkeypatch.setattr(directory_module, "find_directory", lambda name: found)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HERE))
    monkeypatch.setattr(job_engines, "_cluster_watched", lambda **_: nullcontext())
    monkeypatch.setattr(job_engines, "_open_generator", lambda directory, model: nullcontext(OWN))
    monkeypatch.setattr(first_rows, "open_first_rows", lambda address, own: nullcontext(address))
    settings = {"name": "j", "model": "m", "task": "generate", "prompt": "{t}", "engine": "shared"}
    job = Job.model_validate({**settings, "input": {"path": "in"}, "output": {"path": "out"}})
    with job_engines.open_engines(job, None, None) as connect:
        opened: Any = connect()
        with opened as asked:
            assert asked == way


WATCHED = """
import socket, subprocess, sys, time
from types import SimpleNamespace
import ray
from hycluster import job_engines
from hycluster.serving import ray_state
gcs = socket.create_server(("127.0.0.1", 0))
raylet = subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
ray.get_runtime_context = lambda: SimpleNamespace(gcs_address=f"127.0.0.1:{gcs.getsockname()[1]}")
ray_state.raylet_here = lambda: raylet.pid
with job_engines._cluster_watched(own=False):
    print(raylet.pid, flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("who", ["raylet", "job"])
def test_a_job_whose_cluster_is_gone_ends_at_once_with_a_word(who: str) -> None:
    """It waited for Ray's patience of a minute, and ended without one; where Ray was stopped in order, at once, too."""
    command = [sys.executable, "-c", WATCHED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        raylet = int(job.stdout.readline())
        # A job's own end stands for what Ray's C++ does to it.
        os.kill(raylet if who == "raylet" else job.pid, signal.SIGKILL)
        _, said = job.communicate(timeout=60)
    if who == "job":
        os.kill(raylet, signal.SIGKILL)
        assert said == f"{job_engines.SUDDEN}\n"
        return
    assert job.returncode == 1
    first, _ = said.splitlines()
    assert first == (
        f"lost: Ray's raylet (pid {raylet}); this command ends, with exit code 1; the same command goes on from here,"
        " once there is a cluster"
    )
