from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import time

import pytest
import ray

from hycluster import cluster
from hycluster.errors import SettingsError
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.settings import Settings
from tests.replica.placed_model import model

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
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
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


def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(SettingsError, match=rf"^--address: no Ray cluster at '127\.0\.0\.1:{port}': .*refused"):
        cluster.connect(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("timeouts", "starts"), [(0, 1), (2, 3)])
def test_ray_may_take_longer_than_it_gives_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, timeouts: int, starts: int
) -> None:
    begun = []

    def init(**_: object) -> None:
        begun.append(subprocess.Popen(["sleep", "100"]))
        if len(begun) <= timeouts:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    cluster._start_node()
    assert len(begun) == starts
    assert len(caplog.records) == timeouts
    # What a start that failed has left is gone; what serves is not.
    for process in begun[:-1]:
        assert process.wait(5) < 0
    assert begun[-1].poll() is None
    begun[-1].kill()
    begun[-1].wait()


def test_what_else_keeps_ray_from_starting_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def init(**_: object) -> None:
        begun.append(1)
        raise ValueError("no")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="no"):
        cluster._start_node()
    assert begun == [1]


def test_a_token_is_asked_for_as_ray_does_by_itself() -> None:
    """Ray does it for a cluster that it starts, and for one that is named it still does not."""
    from ray._private import worker

    script = (
        "import os; from ray._private.authentication import authentication_token_setup as setup\n"
        "setup.enable_token_auth_by_default(); print(os.environ['RAY_AUTH_MODE'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.split() == ["token"]
    joining = inspect.getsource(worker.init).partition("if bootstrap_address is None:")
    assert "enable_token_auth_by_default()" in joining[2]
    assert joining[2].count("enable_token_auth_by_default") == 1
    assert "enable_token_auth_by_default" not in joining[0]
