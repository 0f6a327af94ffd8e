"""Memory runs out: batch work gives way, and an engine that has more than it was given; nobody else does.

A hog, which is none of ours, takes what is left up to a threshold that is set a few GiB above what the machine uses at
the start. Under load, with a bulk job. Ray's own monitor would take the directory and Serve's controller.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from hycluster.client import AsyncClient
from hycluster.memory import GIB, THRESHOLD_VARIABLE, usage
from tests.families import words_below
from tests.integration.conftest import SIMULATED, Served, launch, stop
from tests.integration.test_rolling import ENGINE, PROMPTS, Answer, Load, until
from tests.ray_forks import RAY_FORKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.alone("the memory of all that runs here counts"),
    pytest.mark.machine("what others take or free of its memory meanwhile is taken for its own"),
]

GREEDY = "greedy"
# The service has about half of it.
HEADROOM_BYTES = 4 * GIB
KEPT = ("ServeController", "Directory", ":ingress", ":batches", f":replica-{SIMULATED}")

HOG = """
import sys
from hycluster.memory import threshold, usage
kept = []
# A little more than the noise of the rest of the machine.
while usage().share < threshold() + 0.02 and len(kept) < 96:
    kept.append(bytearray(b"x") * (64 << 20))
print("full", flush=True)
sys.stdin.read()
"""

JOB = """
import time
import ray
from hycluster import cluster

def hold(batch):
    kept = bytearray(b"x") * (256 << 20)
    time.sleep(2)
    return {"id": batch["id"] * 2}

cluster.join_cluster()
ray.data.DataContext.get_current().enable_progress_bars = False
rows = ray.data.range(4, override_num_blocks=4).map_batches(hold, num_cpus=0, concurrency=2).take_all()
print("sum", sum(row["id"] for row in rows))
"""


@dataclass(frozen=True)
class Pressed:
    served: Served
    env: dict[str, str]


@pytest.fixture
def pressed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pressed]:
    # Forks share what each worker otherwise has for itself.
    monkeypatch.delenv(RAY_FORKS[0], raising=False)
    model = {
        "name": SIMULATED,
        "source": str(tiny_model),
        "simulated": ENGINE.model_dump(),
        "engine": {"max_model_len": 2048},
        # More than it needs.
        "hardware": {"cpus": 0.05, "memory_gib": 2},
    }
    settings = {
        "models": [model, model | {"name": GREEDY, "hardware": {"cpus": 0.05, "memory_gib": 0.01}}],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "data_plane": {"host": "127.0.0.1"},
        "batches": {"store": str(tmp_path / "batches")},
        "drain_timeout_s": 5,
    }
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(settings))
    now = usage()
    threshold = (now.used_bytes + HEADROOM_BYTES) / now.total_bytes
    if threshold > 0.9:
        pytest.skip(f"the machine has too little memory left for this: {now}")
    env = {"HYCLUSTER_HOME": str(tmp_path / "home"), THRESHOLD_VARIABLE: f"{threshold:.4f}"}
    server = launch([str(path)], tmp_path / "serve.log", env)
    try:
        yield Pressed(server, env)
    finally:
        if server.process.poll() is None:
            stop(server.process)


def workers(served: Served, *titles: str) -> dict[str, set[int]]:
    """By part of its title, pids of the processes of Ray's that have it."""
    found: dict[str, set[int]] = {title: set() for title in titles}
    for process, words in words_below(served.process.pid).items():
        name = " ".join(words)
        for title in titles:
            if name.startswith("ray::") and title in name:
                found[title].add(process.pid)
    return found


async def test_what_gives_way(pressed: Pressed) -> None:
    served, env = pressed.served, {**os.environ, **pressed.env}
    before = workers(served, *KEPT)
    assert all(len(pids) == 1 for pids in before.values()), before
    (greedy,) = workers(served, f":replica-{GREEDY}").values()
    load = Load(served)
    async with httpx.AsyncClient(timeout=120) as http, AsyncClient(served.grpc) as caller:

        async def http_call(prompt: str, tokens: int) -> Answer:
            return await load.over_http(http, prompt, tokens)

        async def grpc_call(prompt: str, tokens: int) -> Answer:
            return await load.over_grpc(caller, prompt, tokens)

        asking = [
            asyncio.create_task(load.keep_asking(way, call, prompt))
            for prompt in PROMPTS[:2]
            for way, call in (("HTTP", http_call), ("gRPC", grpc_call))
        ]
        job = await asyncio.create_subprocess_exec(
            sys.executable, "-c", JOB, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        hog = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOG, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )
        try:
            assert hog.stdout is not None
            assert await hog.stdout.readline() == b"full\n"
            said = served.log.read_text
            await until(lambda: "Ray Data does it again" in said(), 60)
            await until(lambda: not workers(served, f":replica-{GREEDY}")[f":replica-{GREEDY}"] & greedy, 60)
            await until(lambda: "nothing here is over its bounds, so nothing is ended" in said(), 60)
            hog.kill()
            out, errors = await asyncio.wait_for(job.communicate(), 120)
        finally:
            for process in (hog, job):
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            load.ending.set()
            await asyncio.gather(*asking)
    # Its rows, each once, though its workers were killed.
    # Ray may say its own after it.
    assert "sum 12" in out.decode().splitlines(), errors.decode()
    assert load.wrong == []
    assert min(load.outcomes[f"{way} right"] for way in ("HTTP", "gRPC")) > 20
    assert workers(served, *KEPT) == before
    assert f"engine {greedy.pop()} is ended: it has " in served.log.read_text()
