from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application

from hycluster.app import application, build, deployment_name, replicas
from hycluster.directory.starts import ENDLESS
from hycluster.errors import SettingsError
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Autoscaling, Hardware, Replicas
from hycluster.settings.settings import Settings

SETTINGS: dict[str, Any] = {
    "models": [
        {"name": "Org/Big-1.5", "source": "/big", "replicas": {"min": 3}, "hardware": {"cpus": 2}},
        {"name": "small", "source": "/small"},
    ],
    "ingress": {"replicas": 2},
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


def test_an_application_is_ingress_processes_over_a_deployment_a_model() -> None:
    app = build(SETTINGS | {"batches": None})
    ingress = deployment(app)
    assert (ingress.name, ingress.num_replicas) == ("ingress", 2)
    settings, directory, *replicas = ingress.init_args
    assert settings == Settings(**SETTINGS, batches=None)
    assert directory == "hycluster-directory"
    deployed = [deployment(replica) for replica in replicas]
    assert [(d.name, d.num_replicas) for d in deployed] == [("replica-org-big-1-5", 3), ("replica-small", 1)]
    assert [d.init_args[0].name for d in deployed] == ["Org/Big-1.5", "small"]
    assert deployed[0].ray_actor_options["num_cpus"] == 2
    # An ingress process's successor always starts first, a replica's where there is room.
    assert [d._deployment_config.max_surge_percent for d in (ingress, *deployed)] == [50, 0, 0]
    # Serve must not kill what is still draining.
    for each in (ingress, *deployed):
        assert each._deployment_config.graceful_shutdown_timeout_s > settings.drain_timeout_s


def test_successors_start_first_where_there_is_room() -> None:
    app = application(Settings(**SETTINGS, batches=None), surging={"Org/Big-1.5"})
    replicas = [deployment(replica) for replica in deployment(app).init_args[2:]]
    # One more than three, and no more than one.
    assert [d._deployment_config.max_surge_percent for d in replicas] == [34, 0]


def test_ingress_processes_leave_the_cores_to_the_engines() -> None:
    ingress = deployment(application(Settings(models=(model(replicas=Replicas(min=2)),))))
    # Nor is there ever no room for a successor.
    assert ingress.ray_actor_options["num_cpus"] == 0
    assert ingress.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"


def test_ingress_processes_go_where_their_resources_are() -> None:
    ingress = deployment(build(SETTINGS | {"ingress": {"replicas": 2, "resources": {"ingress": 0.5}}}))
    assert ingress.ray_actor_options["resources"] == {"ingress": 0.5}
    with pytest.raises(SettingsError, match=r"ingress.resources.ingress: 0"):
        build(SETTINGS | {"ingress": {"replicas": 2, "resources": {"ingress": 0}}})
    # And one of them to a node, where that is asked for.
    apart = deployment(
        build(SETTINGS | {"ingress": {"replicas": 2, "resources": {"ingress": 0.5}, "replicas_per_node": 1}})
    )
    assert sorted(apart.ray_actor_options["resources"].values()) == [0.5, 1.0]


def test_settings_that_come_by_serve_surge_where_the_cluster_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2.5})
    monkeypatch.setattr("ray.nodes", list)
    replicas = [deployment(replica) for replica in deployment(build(SETTINGS | {"batches": None})).init_args[2:]]
    # The first one's successor asks for two; the second one's for one, which is not left.
    assert [d._deployment_config.max_surge_percent for d in replicas] == [34, 0]


def test_batch_api_have_one_process_beside_the_ingress_processes() -> None:
    ingress = deployment(build(SETTINGS))
    settings, directory, *_, last = ingress.init_args
    executor = deployment(last)
    assert (executor.name, executor.num_replicas) == ("batches", 1)
    assert executor.init_args == (settings, directory)
    # Engines may have asked for all that a machine has.
    assert executor.ray_actor_options["num_cpus"] == 0
    kept = {"batches": {"resources": {"batches": 1}}}
    *_, last = deployment(build(SETTINGS | kept)).init_args
    assert deployment(last).ray_actor_options["resources"] == {"batches": 1}


def test_what_does_not_start_is_tried_for_ever() -> None:
    ingress = deployment(build(SETTINGS))
    for each in (ingress, *(deployment(bound) for bound in ingress.init_args[2:])):
        assert each._deployment_config.max_constructor_retry_count == ENDLESS
    # An upgrade stops, and leaves the old replicas that there are.
    ingress = deployment(application(Settings(**SETTINGS), counts={"Org/Big-1.5": 3}))
    first, second = (deployment(bound) for bound in ingress.init_args[2:4])
    counts = [d._deployment_config.max_constructor_retry_count for d in (ingress, first, second)]
    assert counts == [6, 9, ENDLESS]


def test_wrong_settings_are_refused_before_anything_is_built() -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        build(SETTINGS | {"nonsense": 1})


def test_only_a_replica_of_several_reservations_has_a_placement_group() -> None:
    def config(**fields: Any) -> Any:
        asked = model(**fields)
        return deployment(replicas(asked, Settings(models=(asked,)), "directory"))._replica_config

    assert config().placement_group_bundles is None
    group = config(parallel=Parallel(data=2), hardware=Hardware(cpus=3, placement="strict_spread"))
    assert group.placement_group_bundles == [{"CPU": 3}] * 2
    assert group.placement_group_strategy == "STRICT_SPREAD"


def scaled(counts: dict[str, int] | None = None, surging: tuple[str, ...] = ()) -> Any:
    """The deployment of a pool that follows its load, beside one of fixed size."""
    followed = model(
        replicas=Replicas(min=0, max=4, initial=2),
        autoscaling=Autoscaling(scale_down_after_s=7),
        parallel=Parallel(data=2),
    )
    settings = Settings(models=(followed, model(name="fixed")), batches=None)
    pools = deployment(application(settings, "d", surging, counts)).init_args[2:]
    return [deployment(pool) for pool in pools]


def test_a_pool_that_follows_its_load_is_serves_to_scale() -> None:
    followed, fixed = scaled()
    config = followed._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 2, 4)
    asked = config.policy.policy_kwargs
    assert (asked["model"], asked["directory"], asked["ranks"]) == ("m", "d", 2)
    assert asked["autoscaling"]["scale_down_after_s"] == 7
    assert fixed._deployment_config.autoscaling_config is None
    assert fixed.num_replicas == 1


@pytest.mark.parametrize(("found", "surge_percent"), [(0, 100), (1, 100), (3, 34)])
def test_an_upgrade_keeps_the_count_that_it_finds(found: int, surge_percent: int) -> None:
    followed, fixed = scaled({"m": found, "fixed": 1}, surging=("m", "fixed"))
    assert followed._deployment_config.autoscaling_config.initial_replicas is None
    assert followed._deployment_config.max_surge_percent == surge_percent
    assert fixed.num_replicas == 1


def test_a_model_that_comes_with_an_upgrade_starts_as_its_settings_say() -> None:
    followed, _ = scaled({"fixed": 1})
    assert followed._deployment_config.autoscaling_config.initial_replicas == 2
