"""What callers, probes and Serve see of replicas and ingress processes that stop or go, on a real cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hycluster.settings.objectives import Objectives
from tests.integration.conftest import SIMULATED, Served, eventually, replicas
from tests.prometheus import Prometheus, hastened, prometheus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERVING = health_pb2.HealthCheckResponse.SERVING


def processes(served: Served, name: str) -> list[psutil.Process]:
    """Processes of a deployment."""
    below = psutil.Process(served.process.pid).children(recursive=True)
    return [p for p in below if f":{name}" in " ".join(p.cmdline())]


def http_health(served: Served, **asked: str) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(f"{served.http}/health", params=asked, timeout=10)
    return answer.status_code, answer.json()


def grpc_health(served: Served) -> int:
    with grpc.insecure_channel(served.grpc) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        return status


@pytest.fixture
def watched(served: Served, tmp_path: Path) -> Iterator[Prometheus]:
    """Reads the ingress, and judges it by our alerts, with shorter times."""
    rules = hastened(Objectives(), windows=60, waits=600)
    with prometheus([urlsplit(served.http).netloc], tmp_path, rules) as running:
        eventually(running.healthy, 30, "the ingress has been read")
        yield running


def fired(watched: Prometheus) -> set[tuple[str, str]]:
    """Alerts that have, each with its model."""
    series = watched.query('last_over_time(ALERTS{alertstate="firing",model!=""}[10m])')
    return {(one["metric"]["alertname"], one["metric"]["model"]) for one in series}


def test_stopped_replicas_are_killed_and_replaced(served: Served, watched: Prometheus) -> None:
    eventually(lambda: len(replicas(SIMULATED)) == 2, 60, "both replicas are there")
    with ThreadPoolExecutor() as callers:
        asked = {"model": SIMULATED, "prompt": "x", "max_tokens": 300, "ignore_eos": True}
        url = f"{served.http}/v1/completions"
        asking = [callers.submit(httpx.post, url, json=asked, timeout=200) for _ in range(4)]
        time.sleep(1)
        _stopped_replicas_are_killed_and_replaced(served)
        # Who was there when they were stopped has waited, and no more.
        assert [each.result().status_code for each in asking] == [200] * 4
    names, models = zip(*fired(watched), strict=True)
    # They are dead before they are silent for long: HyclusterReplicaHung is for those that nobody could kill.
    assert set(names) >= {"HyclusterModelUnavailable", "HyclusterReplicasMissing"}
    assert set(models) == {SIMULATED}


def _stopped_replicas_are_killed_and_replaced(served: Served) -> None:
    assert http_health(served)[1]["models"][SIMULATED] == {"replicas_ready": 2, "replicas_wanted": 2}
    victims = processes(served, f"replica-{SIMULATED}")
    assert len(victims) == 2
    for victim in victims:
        os.kill(victim.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    _, alive = psutil.wait_procs(victims, 30)
    assert not alive
    gone_after_s = time.monotonic() - stopped
    _, body = eventually(
        lambda: (got := http_health(served, model=SIMULATED))[0] == 503 and got,
        5, "the ingress process knows that no replica can serve",
    )  # fmt: skip
    assert body["status"] == "unavailable"
    # Its replicas' next starts may have begun; nothing is wrong with those.
    assert (body["models"][SIMULATED]["replicas_ready"], body["models"][SIMULATED]["replicas_wanted"]) == (0, 2)
    # The other models are there, so the ingress process keeps its callers.
    status, body = http_health(served)
    assert (status, body["status"]) == (200, "degraded")
    assert all(pool["replicas_ready"] for name, pool in body["models"].items() if name != SIMULATED)
    assert grpc_health(served) == SERVING
    eventually(lambda: http_health(served, model=SIMULATED)[0] == 200, 90, "a successor can serve")
    eventually(
        lambda: http_health(served)[1]["models"][SIMULATED]["replicas_ready"] == 2, 90, "the pool is whole again"
    )
    # A second to be sure, and what a loaded machine adds to it.
    assert gone_after_s < 10
