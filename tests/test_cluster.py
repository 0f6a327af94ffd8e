from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from hycluster import cluster
from hycluster.config import Model, Parallel, Settings
from hycluster.errors import SettingsError
from tests.placed_model import model

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _not_joined_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this session may have left a Ray cluster running in this process."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the Ray cluster has."""
    resources = {"CPU": 8.0, "GPU": 4.0, "memory": 64.0 * GIB, "accelerator_type:H20": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    return resources


@pytest.mark.parametrize(
    "models",
    [
        (model(cpus=8),),
        (model(cpus=2, replicas=4, memory_gib=16),),
        (model("a", accelerator="H20", parallel=Parallel(tensor=2)), model("b", accelerator="H20", replicas=2)),
    ],
)
@pytest.mark.usefixtures("there")
def test_what_fits(models: tuple[Model, ...]) -> None:
    cluster.check_resources(models)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ((model(cpus=3, replicas=3),), "hardware.cpus: all replicas together ask for 9 CPUs; this Ray cluster has 8"),
        ((model("a", cpus=5), model("b", cpus=4)), "ask for 9 CPUs; this Ray cluster has 8"),
        (
            (model(accelerator="H20", parallel=Parallel(tensor=4, pipeline=2)),),
            "hardware.accelerator: all replicas together ask for 8 GPUs; this Ray cluster has 4",
        ),
        (
            (model(memory_gib=40, replicas=2),),
            "hardware.memory_gib: all replicas together ask for 80 memory GiB; this Ray cluster has 64",
        ),
        ((model(accelerator="H100"),), "m: hardware.accelerator: 'H100' is not in this Ray cluster; there are ['H20']"),
    ],
)
@pytest.mark.usefixtures("there")
def test_what_does_not_fit_is_named(models: tuple[Model, ...], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        cluster.check_resources(models)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_no_gpus_at_all(there: dict[str, float]) -> None:
    del there["GPU"], there["accelerator_type:H20"]
    with pytest.raises(SettingsError, match="ask for 1 GPUs; this Ray cluster has 0"):
        cluster.check_resources((model(accelerator="H20"),))


def test_doors_need_nodes_that_have_what_they_reserve(there: dict[str, float]) -> None:
    settings = Settings(models=(model(),), doors=2, door_resources={"door": 0.5})
    with pytest.raises(SettingsError, match=r"door_resources: door: all doors together ask for 1; this .* has 0$"):
        cluster.check_doors(settings)
    there["door"] = 1.0
    cluster.check_doors(settings)


@pytest.mark.parametrize(("nodes", "waits"), [(1, True), (2, False)])
def test_doors_that_wait_for_a_node_are_told_of(
    there: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: int,
    waits: bool,
) -> None:
    there["door"] = float(nodes)
    monkeypatch.setattr(cluster, "door_nodes", lambda settings: nodes)
    settings = Settings(models=(model(),), doors=2, door_resources={"door": 0.5}, doors_per_node=1)
    cluster.check_doors(settings)
    assert ("1 of 2 doors wait for a node" in caplog.text) == waits


class TestRememberedCluster:
    """``hycluster serve`` leaves its address for other commands on this machine."""

    @pytest.fixture(autouse=True)
    def _home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HYCLUSTER_HOME", str(tmp_path))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        cluster._clusters().mkdir(parents=True)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Addresses that ``ray.init`` is called with; nothing answers there."""
        addresses: list[str] = []

        def init(address: str, **_: Any) -> None:
            addresses.append(address)
            raise ConnectionError("nobody\nthere")

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(cluster, "enable_token_auth_by_default", lambda: None)
        monkeypatch.setattr(cluster, "_check_reachable", lambda address: None)
        monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        return addresses

    def remember(self, pid: int, address: str = "127.0.0.1:1234", started: float = 0) -> None:
        file = cluster._clusters() / f"{pid}.json"
        file.write_text(json.dumps({"address": address, "pid": pid}))
        os.utime(file, (started, started))

    @pytest.fixture
    def dead(self) -> int:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        return process.pid

    def test_it_is_joined_while_its_process_lives(self, asked: list[str]) -> None:
        self.remember(os.getpid())
        with pytest.raises(SettingsError, match=r"^RAY_ADDRESS: no Ray cluster at '127.0.0.1:1234': nobody there$"):
            cluster.connect()
        assert asked == ["127.0.0.1:1234"]

    def test_it_is_ignored_when_its_process_is_dead(self, asked: list[str], dead: int) -> None:
        self.remember(dead)
        with pytest.raises(SettingsError, match="no Ray cluster on this machine"):
            cluster.connect()
        assert asked == ["auto"]

    def test_of_several_it_is_the_last_that_lives(self, asked: list[str], dead: int) -> None:
        self.remember(os.getppid(), "127.0.0.1:1", started=1)
        self.remember(os.getpid(), "127.0.0.1:2", started=2)
        self.remember(dead, "127.0.0.1:3", started=3)
        with pytest.raises(SettingsError, match=r"no Ray cluster at '127.0.0.1:2'"):
            cluster.connect()
        assert asked == ["127.0.0.1:2"]
        assert not (cluster._clusters() / f"{dead}.json").exists()

    @pytest.mark.parametrize("content", ["", "nonsense", "{}"])
    def test_a_broken_file_is_ignored(self, asked: list[str], content: str) -> None:
        (cluster._clusters() / "1.json").write_text(content)
        with pytest.raises(SettingsError):
            cluster.connect()
        assert asked == ["auto"]

    def test_a_named_cluster_comes_first(self, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.remember(os.getpid())
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        with pytest.raises(SettingsError, match=r"at '10.0.0.1:6379'"):
            cluster.connect()
        with pytest.raises(SettingsError):
            cluster.connect("10.0.0.2:6379")
        assert asked == ["10.0.0.1:6379", "10.0.0.2:6379"]


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(SettingsError, match=rf"^RAY_ADDRESS: no Ray cluster at '127\.0\.0\.1:{port}': .*refused"):
        cluster.connect(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 2
