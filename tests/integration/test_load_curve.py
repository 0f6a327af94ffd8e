"""A pool that follows its load, on a cluster of its own with simulated engines: it wakes, grows, shrinks and sleeps.

``python -m bench.load_curve`` does the same with a real engine, and draws it.
"""

from __future__ import annotations

import asyncio
import json
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.gateway import MODEL
from bench.load_curve import drive, model_settings, plotted, up_and_down
from hycluster.client import AsyncClient
from hycluster.errors import Unavailable
from tests.integration.conftest import Served, launch, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHY = "shy"
QUIET_S = 4


@pytest.fixture(scope="module")
def scaled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Nobody has asked for either model yet."""
    waits = model_settings(tiny_model, "simulated", QUIET_S)
    refuses = waits | {"name": SHY, "autoscaling": waits["autoscaling"] | {"cold_start": "refuse"}}
    settings = {
        "models": [waits, refuses],
        "http": {"port": 0},
        "grpc": {"port": 0},
        "batches": None,
        "data_plane": {"host": "127.0.0.1"},
    }
    folder = tmp_path_factory.mktemp("scaled")
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))
    # A home of its own: the other tests' cluster stays the one that commands find.
    server = launch([str(path)], folder / "serve.log", {"HYCLUSTER_HOME": str(folder / "home")})
    try:
        yield server
    finally:
        if server.process.poll() is None:
            stop(server.process)


async def test_callers_of_a_sleeping_model_are_told_when_to_come_back(scaled: Served) -> None:
    body = {"model": SHY, "prompt": "x", "max_tokens": 2}
    async with httpx.AsyncClient(timeout=30) as http, AsyncClient(scaled.grpc) as caller:
        # All is well: whoever asks is served, sooner or later.
        health = await http.get(f"{scaled.http}/health")
        asleep = {"replicas_ready": 0, "replicas_wanted": 0, "wakes": True}
        assert (health.status_code, health.json()["models"]) == (200, {MODEL: asleep, SHY: asleep})
        assert await caller.ready()
        listed = (await http.get(f"{scaled.http}/v1/models")).json()["data"]
        assert {model["id"] for model in listed} == {MODEL, SHY}
        with pytest.raises(Unavailable, match="'shy' is starting") as refused:
            await caller.generate(model=SHY, prompt="x", max_tokens=2)
        assert refused.value.retry_after_s
        deadline, waits = time.monotonic() + 60, []
        while (answer := await http.post(f"{scaled.http}/v1/completions", json=body)).status_code == 503:
            assert "'shy' is starting" in answer.json()["error"]["message"]
            waits.append(int(answer.headers["Retry-After"]))
            assert time.monotonic() < deadline
            await asyncio.sleep(0.5)
        assert answer.json()["usage"]["completion_tokens"] == 2
        assert min(waits) >= 1


async def test_the_pool_follows_its_load_and_no_request_fails(scaled: Served) -> None:
    run = await drive(scaled.http, scaled.grpc, MODEL, up_and_down(callers=10, hold_s=1), max_tokens=32)
    assert [answer.error for answer in run.failed] == []
    assert run.counts == [0, 1, 2, 1, 0]
    assert {answer.ingress for answer in run.answers} == {"HTTP", "gRPC"}
    assert len(run.ttfts_s(1)) == sum(answer.phase == 1 for answer in run.answers) > 0
    # The one who woke it waited for a start, the others did not.
    assert run.answers[0].phase == 1
    assert (run.answers[0].ttft_s or 0) > 1
    dots = ET.fromstring(plotted(run)).find(".//*[@id='ttft']")
    assert dots is not None
    assert len(dots.findall(".//{*}use")) == len(run.answers)
    async with httpx.AsyncClient(timeout=30) as http:
        lines = (await http.get(f"{scaled.http}/metrics")).text.splitlines()
    shown = dict(line.rsplit(" ", 1) for line in lines if line.startswith("hycluster_") and f'model="{MODEL}"' in line)
    assert float(shown[f'hycluster_replicas_target{{model="{MODEL}"}}']) == 0
    assert float(shown[f'hycluster_cold_start_seconds{{model="{MODEL}"}}']) > 0
    counts = {cause: float(shown[f'hycluster_scaling_decisions_total{{cause="{cause}",model="{MODEL}"}}'])
              for cause in ("wake", "queue", "quiet", "idle")}  # fmt: skip
    assert counts == {"wake": 1, "queue": 1, "quiet": 1, "idle": 1}
