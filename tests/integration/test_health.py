"""What callers, probes and Serve see of replicas and ingress processes that stop or go, on a real cluster."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.families import titled_below
from tests.integration.conftest import SIMULATED, Served, eventually, replicas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERVING = health_pb2.HealthCheckResponse.SERVING


def processes(served: Served, name: str) -> list[psutil.Process]:
    """Processes of a deployment."""
    return titled_below(served.process.pid, f":{name}")


def http_health(served: Served, **asked: str) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(f"{served.http}/health", params=asked, timeout=60)
    return answer.status_code, answer.json()


def grpc_health(served: Served) -> int:
    with grpc.insecure_channel(served.grpc) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status
        return status


def test_stopped_replicas_are_killed_and_replaced(served: Served) -> None:
    eventually(lambda: len(replicas(SIMULATED)) == 2, 60, "both replicas are there")
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
        60, "the ingress process knows that no replica can serve",
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
