from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application

from hycluster.app import actor_options, application, build, deployment_name
from hycluster.config import Hardware, Model, Parallel, Replicas, Settings, Simulated
from hycluster.errors import SettingsError

GIB = 1 << 30
SETTINGS: dict[str, Any] = {
    "models": [
        {"name": "Org/Big-1.5", "source": "/big", "replicas": {"min": 3}, "hardware": {"cpus": 2}},
        {"name": "small", "source": "/small"},
    ],
    "doors": 2,
    "drain_timeout_s": 20,
}


def model(**fields: Any) -> Model:
    return Model(**({"name": "m", "source": "/m"} | fields))


def deployment(app: Application) -> Any:
    return app._bound_deployment


@pytest.mark.parametrize(
    ("name", "deployed"),
    [("m", "replica-m"), ("Org/Big-1.5", "replica-org-big-1-5"), ("a::b_", "replica-a-b")],
)
def test_deployment_name(name: str, deployed: str) -> None:
    assert deployment_name(model(name=name)) == deployed


def test_a_cpu_replica_reserves_cpus_and_memory() -> None:
    options = actor_options(model(hardware=Hardware(cpus=1.5, memory_gib=2)))
    assert options["num_cpus"] == 1.5
    assert options["memory"] == 2 * GIB
    assert not {"num_gpus", "accelerator_type"} & options.keys()
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"


def test_a_gpu_replica_reserves_its_devices() -> None:
    options = actor_options(model(hardware=Hardware(accelerator="H20"), parallel=Parallel(tensor=4, pipeline=2)))
    assert (options["num_gpus"], options["accelerator_type"]) == (8, "H20")
    assert "memory" not in options
    assert "LD_PRELOAD" not in options["runtime_env"]["env_vars"]


def test_a_simulated_replica_reserves_no_device() -> None:
    options = actor_options(model(hardware=Hardware(accelerator="H20"), simulated=Simulated()))
    assert not {"num_gpus", "accelerator_type"} & options.keys()


def test_an_application_is_doors_over_a_deployment_a_model() -> None:
    app = build(SETTINGS)
    door = deployment(app)
    assert (door.name, door.num_replicas) == ("door", 2)
    settings, directory, *replicas = door.init_args
    assert settings == Settings(**SETTINGS)
    assert directory == "hycluster-directory"
    deployed = [deployment(replica) for replica in replicas]
    assert [(d.name, d.num_replicas) for d in deployed] == [("replica-org-big-1-5", 3), ("replica-small", 1)]
    assert [d.init_args[0].name for d in deployed] == ["Org/Big-1.5", "small"]
    assert deployed[0].ray_actor_options["num_cpus"] == 2
    # Serve must not kill what is still draining.
    for each in (door, *deployed):
        assert each._deployment_config.graceful_shutdown_timeout_s > settings.drain_timeout_s


def test_doors_leave_the_cores_to_the_engines() -> None:
    door = deployment(application(Settings(models=(model(replicas=Replicas(min=2)),))))
    assert door.ray_actor_options["num_cpus"] < 0.1
    assert door.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"


def test_wrong_settings_are_refused_before_anything_is_built() -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        build(SETTINGS | {"nonsense": 1})
