"""Ingress processes on nodes of their own: late ones, a lost one, another in its place.

A Ray head with the engine, and nodes as the ingress pods start them, all on this machine; ``hycluster serve`` joins it.
That ingress processes are replaced one by one with no node more than there are ingress processes is seen in
``test_serve_deploy.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from serve_overlay import ingress_node

from bench.gateway import free_port
from hycluster.client import AsyncClient
from hycluster.watchdog import kill_family
from tests.families import titled_below
from tests.integration.conftest import SIMULATED, Served, eventually, launch, stop
from tests.integration.test_rolling import ENGINE, SHORT, Answer, Load, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

INGRESS_S = 120
PROMPTS = ["one", "two", "three"]


def ingresses_of(node: subprocess.Popen[str]) -> list[psutil.Process]:
    return titled_below(node.pid, "ServeReplica:hycluster:ingress")


def listens(ingress: psutil.Process, port: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in ingress.net_connections("tcp"))
    return False


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a Ray head without a place for ingress processes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-this-test")
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            sys.executable, "-u", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
            f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", f"--object-store-memory={128 << 20}",
            "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    try:
        while "Ray runtime started" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[contextlib.ExitStack]:
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
    with contextlib.ExitStack() as stack:
        yield stack


async def test_ingress_processes_are_apart_late_after_a_loss_and_again(
    head: str, nodes: contextlib.ExitStack, tiny_model: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    model = {
        "name": SIMULATED,
        "source": str(tiny_model),
        "simulated": ENGINE.model_dump(),
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": 0.1},
    }
    http_port = free_port()
    text = {
        "models": [model],
        "http": {"port": http_port},
        "grpc": {"port": free_port()},
        "ingress": {"replicas": 2, "replicas_per_node": 1, "resources": {"ingress": 0.5}},
        "data_plane": {"host": "127.0.0.1"},
        "batches": None,
        "drain_timeout_s": 5,
    }
    settings.write_text(json.dumps(text))
    first = nodes.enter_context(ingress_node(head))
    servers: list[Served] = []
    env = {"RAY_ADDRESS": head, "HYCLUSTER_HOME": str(tmp_path / "home")}
    serving = threading.Thread(
        target=lambda: servers.append(launch([str(settings)], tmp_path / "serve.log", env)), daemon=True
    )
    serving.start()
    await asyncio.to_thread(eventually, lambda: ingresses_of(first), INGRESS_S, "an ingress process on the only node")
    # Both have been asked for; without a bound the second would be beside the first by now, or soon.
    second = await asyncio.to_thread(nodes.enter_context, ingress_node(head))
    await asyncio.to_thread(serving.join, INGRESS_S)
    (served,) = servers
    try:
        assert (len(ingresses_of(first)), len(ingresses_of(second))) == (1, 1)
        load = Load(served)
        async with httpx.AsyncClient(timeout=60) as http, AsyncClient(served.grpc) as caller:

            async def http_call(prompt: str, tokens: int) -> Answer:
                return await load.over_http(http, prompt, tokens)

            async def grpc_call(prompt: str, tokens: int) -> Answer:
                return await load.over_grpc(caller, prompt, tokens)

            calls = (("HTTP", http_call), ("gRPC", grpc_call), ("new gRPC", load.over_new_grpc))
            await asyncio.gather(*(load.ask(way, call, prompt, SHORT) for prompt in PROMPTS for way, call in calls))
            assert load.wrong == []
            asking = [
                asyncio.create_task(load.keep_asking(way, call, prompt)) for prompt in PROMPTS for way, call in calls
            ]
            (kept,) = ingresses_of(first)
            kill_family(psutil.Process(second.pid))
            await asyncio.sleep(3)
            # Those who were at the lost ingress process have noticed; each of them has had one request there.
            noticed = len(load.wrong)
            assert noticed <= len(asking)
            third = await asyncio.to_thread(nodes.enter_context, ingress_node(head))
            await until(lambda: any(listens(ingress, http_port) for ingress in ingresses_of(third)), INGRESS_S)
            load.ending.set()
            await asyncio.gather(*asking)
        assert load.wrong[noticed:] == []
        assert min(load.outcomes[f"{way} right"] for way, _ in calls) > 20
        assert ingresses_of(first) == [kept]
        assert len(ingresses_of(third)) == 1
    finally:
        stop(served.process)
