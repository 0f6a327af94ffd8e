from __future__ import annotations

import pytest
import ray

from hycluster.errors import SettingsError
from hycluster.serving import resources
from hycluster.settings.ingress import Ingress
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.settings import Settings
from tests.replica.placed_model import model

GIB = 1 << 30


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the Ray cluster has."""
    has = {"CPU": 8.0, "GPU": 4.0, "memory": 64.0 * GIB, "accelerator_type:H20": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": has}])
    return has


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
    resources.check_resources(models)


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
        resources.check_resources(models)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_no_gpus_at_all(there: dict[str, float]) -> None:
    del there["GPU"], there["accelerator_type:H20"]
    with pytest.raises(SettingsError, match="ask for 1 GPUs; this Ray cluster has 0"):
        resources.check_resources((model(accelerator="H20"),))


def test_ingress_processes_need_nodes_that_have_what_they_reserve(there: dict[str, float]) -> None:
    settings = Settings(models=(model(),), ingress=Ingress(replicas=2, resources={"ingress": 0.5}))
    with pytest.raises(
        SettingsError,
        match=r"ingress.resources: ingress: all ingress processes together ask for 1; this .* has 0$",
    ):
        resources.check_ingress(settings)
    there["ingress"] = 1.0
    resources.check_ingress(settings)


@pytest.mark.parametrize(("nodes", "waits"), [(1, True), (2, False)])
def test_ingress_processes_that_wait_for_a_node_are_told_of(
    there: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: int,
    waits: bool,
) -> None:
    there["ingress"] = float(nodes)
    monkeypatch.setattr(resources, "ingress_nodes", lambda settings: nodes)
    settings = Settings(models=(model(),), ingress=Ingress(replicas=2, resources={"ingress": 0.5}, replicas_per_node=1))
    resources.check_ingress(settings)
    assert ("1 of 2 wait" in caplog.text) == waits
