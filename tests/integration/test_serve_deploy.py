"""The dev overlay's Serve settings, given to Ray Serve as KubeRay gives them; changed under load, no request fails.

As the manifest has them, but for the engine, which is simulated, and the ports, which are free ones.
"""

from __future__ import annotations

import asyncio
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from serve_overlay import APPLICATIONS, Dashboard, serve_config

from bench.gateway import free_port
from hycluster.client import AsyncClient
from hycluster.k8s.render import APP_NAME, OVERLAY_MANIFEST
from tests.integration.conftest import SIMULATED, Served, listen, stop
from tests.integration.test_rolling import ENGINE, SHORT, Answer, Load, processes, until
from tests.k8s.kustomize import K8S, ROOT
from tests.ordinary_user import as_ordinary_user
from tests.simulated_pool import predicted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

TOKEN = "a-token-of-this-test"
PROMPTS = ["one", "two", "three"]
UPGRADE_S = 200


@dataclass(frozen=True)
class Overlay:
    served: Served
    config: dict[str, Any]
    dashboard: Dashboard


@pytest.fixture(scope="module")
def overlay(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    config = serve_config(K8S / "overlays" / "dev")
    settings = config["applications"][0]["args"]
    settings["models"][0] |= {
        "name": SIMULATED,
        "source": str(tiny_model),
        "simulated": ENGINE.model_dump(),
        "engine": {"max_model_len": 2048},
        "hardware": {"cpus": 0.25},
    }
    settings["http"]["port"], settings["grpc"]["port"] = free_port(), free_port()
    settings["hand_over_after_s"] = 0.5
    folder = tmp_path_factory.mktemp("overlay")
    (folder / OVERLAY_MANIFEST).write_text(yaml.safe_dump({"spec": {"serveConfigV2": yaml.safe_dump(config)}}))
    log = folder / "serve.log"
    with log.open("w") as errors:
        # A script's path is without the tests, which Ray's hook is among (``tests/ray_forks.py``).
        env = {"HYCLUSTER_HOME": str(folder / "home"), "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            as_ordinary_user([sys.executable, str(ROOT / "scripts" / "serve_overlay.py"), str(folder)], env),
            stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env={**os.environ, **env},
        )  # fmt: skip
    words = listen(process, log)
    try:
        grpc, ray = (words[words.index(name) + 1] for name in ("grpc", "ray"))
        served = Served(process, words[1], grpc, ray, log)
        yield Overlay(served, config, Dashboard(words[words.index("dashboard") + 1], TOKEN))
    finally:
        if process.poll() is None:
            stop(process)


def settled(overlay: Overlay, drain_timeout_s: float) -> bool:
    """Whether Serve runs these settings and nothing else."""
    app = overlay.dashboard.application(APP_NAME)
    args = app["deployed_app_config"]["args"]
    return bool(app["status"] == "RUNNING" and args.get("drain_timeout_s") == drain_timeout_s)


def apart(served: Served) -> bool:
    """Whether each ingress process is on a node of its own: below another raylet."""
    ingresses = processes(served, "ingress")
    return len({psutil.Process(ingress).ppid() for ingress in ingresses}) == len(ingresses)


async def test_both_ingresses_answer(overlay: Overlay) -> None:
    load = Load(overlay.served)
    async with httpx.AsyncClient(timeout=60) as http, AsyncClient(overlay.served.grpc) as caller:
        ids = await caller.tokenize(SIMULATED, prompt="hello")
        expected = tuple(predicted(ids, SHORT, ENGINE))
        assert (await load.over_http(http, "hello", SHORT))[1] == expected
        assert (await load.over_grpc(caller, "hello", SHORT))[1] == expected
    ingresses = overlay.dashboard.application(APP_NAME)["deployments"]["ingress"]["replicas"]
    assert len(ingresses) == overlay.config["applications"][0]["args"]["ingress"]["replicas"]
    assert apart(overlay.served)


async def test_its_token_is_asked_for(overlay: Overlay) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{overlay.dashboard.url}{APPLICATIONS}")
    assert answer.status_code == 401


async def test_new_settings_are_rolled_out_under_load(overlay: Overlay) -> None:
    served = overlay.served
    replicas, ingresses = processes(served, f"replica-{SIMULATED}"), processes(served, "ingress")
    assert (len(replicas), len(ingresses)) == (1, 2)
    config = copy.deepcopy(overlay.config)
    config["applications"][0]["args"]["drain_timeout_s"] = 45
    load = Load(served)
    async with httpx.AsyncClient(timeout=120) as http, AsyncClient(served.grpc) as caller:

        async def http_call(prompt: str, tokens: int) -> Answer:
            return await load.over_http(http, prompt, tokens)

        async def grpc_call(prompt: str, tokens: int) -> Answer:
            return await load.over_grpc(caller, prompt, tokens)

        asking = [
            asyncio.create_task(load.keep_asking(way, call, prompt))
            for prompt in PROMPTS
            for way, call in (("HTTP", http_call), ("gRPC", grpc_call))
        ]
        try:
            await asyncio.to_thread(overlay.dashboard.deploy, config)
            # A lone replica: its successor starts first, as there is room.
            await until(lambda: not processes(served, f"replica-{SIMULATED}") & replicas, timeout_s=UPGRADE_S)
            await until(
                lambda: not processes(served, "ingress") & ingresses and settled(overlay, 45), timeout_s=UPGRADE_S
            )
        finally:
            load.ending.set()
            await asyncio.gather(*asking)
    assert load.wrong == []
    # With as many nodes as ingress processes; each ingress process's successor was there before it went.
    assert apart(served)
    assert min(load.outcomes[f"{way} right"] for way in ("HTTP", "gRPC")) > 20
