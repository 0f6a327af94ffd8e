"""Time from a replica's death to its successor serving, step by step.

    hycluster serve SETTINGS &
    python -m bench.successor --http http://127.0.0.1:8000 MODEL [--signal SIGSTOP] [--times 3]

On the machine that runs ``hycluster serve``, whose replicas of MODEL it kills, one at a time. A row a kill, seconds
after it:

    gone       the process is gone (after SIGSTOP: its watchdog has killed it)
    started    Serve has a new process, with Ray in it, that begins to make the replica
    serving    the ingress process counts the pool as whole again: vLLM imported, model loaded, warmed up, connected
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from typing import Any

import httpx
import psutil

from hycluster.app import deployment_name
from hycluster.settings.model import Model

LOOK_EVERY_S = 0.05
GIVE_UP_S = 300.0


def raylet(http: str) -> psutil.Process:
    """The parent of the ingress process that listens there, and of the replicas beside it."""
    port = httpx.URL(http).port
    for listening in psutil.net_connections("tcp"):
        if (
            listening.status == psutil.CONN_LISTEN
            and listening.laddr
            and listening.laddr.port == port
            and listening.pid
        ):
            parent = psutil.Process(listening.pid).parent()
            if parent is not None:
                return parent
    raise SystemExit(f"--http {http}: nothing on this machine listens there")


def replica_processes(node: psutil.Process, model: str) -> set[int]:
    """Ray names its processes after what they run."""
    title = f"ray::ServeReplica:hycluster:{deployment_name(Model(name=model, source='-'))}"
    found = set()
    for process in node.children():
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.add(process.pid)
    return found


def pool(http: str, model: str) -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = httpx.get(f"{http}/health", timeout=30).json()["models"]
    return models[model]


def is_whole(http: str, model: str) -> bool:
    there = pool(http, model)
    return bool(there["replicas_ready"] >= there["replicas_wanted"])


def after(began: float, check: Any) -> float:
    """Seconds from ``began`` until it holds."""
    while not check():
        if time.monotonic() - began > GIVE_UP_S:
            raise SystemExit(f"gave up after {GIVE_UP_S:.0f} s")
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - began


def measure(http: str, model: str, how: signal.Signals) -> tuple[float, float, float]:
    after(time.monotonic(), lambda: is_whole(http, model))
    node = raylet(http)
    before = replica_processes(node, model)
    victim = min(before)
    began = time.monotonic()
    os.kill(victim, how)
    gone = after(began, lambda: not psutil.pid_exists(victim))
    started = after(began, lambda: replica_processes(node, model) - before)
    # The ingress process must have seen the loss before it can see the pool whole.
    return gone, started, after(began, lambda: is_whole(http, model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--http", default="http://127.0.0.1:8000")
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGSTOP"])
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    print("signal    gone  started  serving   load average")
    for _ in range(asked.times):
        gone, started, serving = measure(asked.http, asked.model, signal.Signals[asked.signal])
        print(f"{asked.signal}  {gone:5.1f}  {started:7.1f}  {serving:7.1f}   {os.getloadavg()[0]:.0f}", flush=True)


if __name__ == "__main__":
    main()
