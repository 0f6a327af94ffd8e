"""A Prometheus (Debian's package) that scrapes what a test serves, and judges it by our rules."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from hycluster.monitoring.alerts import rule_groups
from hycluster.settings.objectives import Objectives

SCRAPES_EVERY_S = 1.0
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# A rule's windows, its wait, and the only bound of a rule that is a time.
WINDOW, SILENCE = re.compile(r"(?<=\[)(\d+)([smhd])(?=\])"), re.compile(r"(?<=_seconds\) > )\d+")


@dataclass(frozen=True)
class Prometheus:
    """One that runs.

    Attributes:
        url: where it is asked.
    """

    url: str

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The series of an expression now, without those that have no number."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": promql}, timeout=20).json()
        assert answer["status"] == "success", (promql, answer)
        return [one for one in answer["data"]["result"] if not math.isnan(float(one["value"][1]))]

    def value(self, promql: str) -> float:
        """Of an expression with one series."""
        (one,) = self.query(promql)
        return float(one["value"][1])

    def firing(self, **labels: str) -> set[str]:
        """Names of the alerts that fire with these labels."""
        wanted = "".join(f',{name}="{value}"' for name, value in labels.items())
        return {one["metric"]["alertname"] for one in self.query(f'ALERTS{{alertstate="firing"{wanted}}}')}

    def healthy(self) -> bool:
        """It has read all of its targets."""
        return bool(self.query("up")) and all(one["value"][1] == "1" for one in self.query("up"))


def milliseconds(duration: str, quicker: float) -> str:
    """A duration of Prometheus' in a part of its time."""
    return f"{UNITS_S[duration[-1]] * int(duration[:-1]) / quicker * 1000:.0f}ms"


def hastened(objectives: Objectives, *, windows: float, waits: float) -> list[dict[str, Any]]:
    """Our rules, with all of their times so many times shorter, and else as they are.

    Args:
        windows: of what they look back on, and of the silence of a replica that is hung.
        waits: of how long it must be so until an alert fires.
    """
    groups = copy.deepcopy(rule_groups(objectives))
    for rule in (rule for group in groups for rule in group["rules"]):
        looks = WINDOW.sub(lambda found: milliseconds(found[0], windows), rule["expr"])
        rule["expr"] = SILENCE.sub(lambda found: f"{int(found[0]) / windows:g}", looks)
        if "for" in rule:
            rule["for"] = milliseconds(rule["for"], waits)
    return groups


def at_once() -> list[dict[str, Any]]:
    """Our rules, which fire at once: how long a fault must last is promtool's to try."""
    groups = copy.deepcopy(rule_groups(Objectives()))
    for rule in (rule for group in groups for rule in group["rules"]):
        rule.pop("for", None)
    return groups


@contextlib.contextmanager
def prometheus(
    targets: Sequence[str], folder: Path, groups: list[dict[str, Any]] | None = None, every_s: float = SCRAPES_EVERY_S
) -> Iterator[Prometheus]:
    """Start one; skips the test where there is none.

    Args:
        targets: ``host:port`` of each.
        groups: the rules; None: :func:`at_once`.
        every_s: how often targets are read and rules looked at.
    """
    command = shutil.which("prometheus")
    if command is None:
        pytest.skip("needs Prometheus (Debian's package prometheus)")
    every = f"{1000 * every_s:.0f}ms"
    rules = [group | {"interval": every} for group in groups or at_once()]
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": rules}))
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "hycluster", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                command, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while not _ready(running):
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        process.wait(30)


def _ready(running: Prometheus) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{running.url}/-/ready", timeout=20).status_code == 200
    return False
