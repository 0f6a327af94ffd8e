"""Serve an overlay of k8s/ on this machine: its Serve settings, by the same REST API that KubeRay uses.

    .venv/bin/python scripts/serve_overlay.py k8s/overlays/dev

Starts a Ray cluster of its own, with a dashboard, a token and a node for each of the ingress pods, and gives it the
overlay's serveConfigV2 as it is. Prints one line beginning "ready" once a request would succeed; Ctrl-C drains and
stops. Model, CPUs and memory must fit this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from hycluster.k8s.render import OVERLAY_MANIFEST

APPLICATIONS = "/api/serve/applications/"


def serve_config(overlay: Path) -> dict[str, Any]:
    """What the overlay gives to Ray Serve."""
    patch = yaml.safe_load((overlay / OVERLAY_MANIFEST).read_text())
    config: dict[str, Any] = yaml.safe_load(patch["spec"]["serveConfigV2"])
    return config


class Dashboard:
    """Ray's dashboard, as KubeRay uses it."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}

    def deploy(self, config: dict[str, Any]) -> None:
        """Give Serve its settings.

        Raises:
            httpx.HTTPStatusError: it refuses them.
        """
        httpx.put(f"{self.url}{APPLICATIONS}", json=config, headers=self._headers, timeout=60).raise_for_status()

    def application(self, name: str) -> dict[str, Any]:
        """What Serve says of an application."""
        answer = httpx.get(f"{self.url}{APPLICATIONS}", headers=self._headers, timeout=60).raise_for_status()
        found: dict[str, Any] = answer.json()["applications"][name]
        return found


@contextlib.contextmanager
def ingress_node(address: str) -> Iterator[subprocess.Popen[str]]:
    """A node of Ray's as an ingress pod starts it, on this machine, once it has started; ends with its ingress
    processes.

    Nodes that start at the same moment take the same sockets: one after the other.
    """
    process = subprocess.Popen(
        [
            sys.executable, "-u", "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=0",
            f"--resources={json.dumps({'ingress': 1})}", f"--object-store-memory={128 << 20}", "--block",
            # Ports of several nodes on one machine must differ.
            "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise RuntimeError(f"ray start: {''.join(said)}")
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overlay", type=Path)
    parser.add_argument("--cpus", type=int, default=2, help="Ray CPUs: those of the overlay's engine pods")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until it must be ready")
    arguments = parser.parse_args()
    config = serve_config(arguments.overlay)
    (application,) = config["applications"]
    settings = application["args"]

    token = os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    from hycluster.directory.directory import NAMESPACE
    from hycluster.serving import deploy

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    # A node that drains waits for its ingress processes; here they have been stopped before it is.
    os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "5")
    ray.init(
        address="local", namespace=NAMESPACE, num_cpus=arguments.cpus, include_dashboard=True,
        dashboard_host="127.0.0.1", dashboard_port=port, log_to_driver=False,
    )  # fmt: skip
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with contextlib.ExitStack() as nodes:
        nodes.callback(ray.shutdown)
        for _ in range(settings["ingress"]["replicas"]):
            nodes.enter_context(ingress_node(ray.get_runtime_context().gcs_address))
        dashboard = Dashboard(f"http://127.0.0.1:{port}", token)
        dashboard.deploy(config)
        while not _answers(settings) and not stopping.wait(0.5):
            state = dashboard.application(application["name"])
            if state["status"] == "DEPLOY_FAILED" or time.monotonic() > begun + arguments.timeout:
                print(f"error: {state['status']}: {state['message']}", file=sys.stderr)
                return 1
        if not stopping.is_set():
            print(
                f"ready http://127.0.0.1:{settings['http']['port']} grpc 127.0.0.1:{settings['grpc']['port']}"
                f" ray {ray.get_runtime_context().gcs_address} dashboard {dashboard.url}"
                f" after {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            stopping.wait()
        deploy.stop(settings.get("drain_timeout_s", 60))
    return 0


def _answers(settings: dict[str, Any]) -> bool:
    """Whether a request would succeed, as a readiness probe asks it."""
    try:
        return httpx.get(f"http://127.0.0.1:{settings['http']['port']}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
