from __future__ import annotations

from typing import Any

import pytest

from hycluster.replica.placement import actor_options, bundle_of, bundles, reserved, strategy, with_room
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.settings.pool import Hardware
from hycluster.settings.simulated import Simulated

GIB = 1 << 30
H20 = {"accelerator_type:H20": 0.001}


def model(**fields: Any) -> Model:
    return Model(**({"name": "m", "source": "/m"} | fields))


def gpus(cpus: float = 4, per_node: int = 8, **parallel: Any) -> Model:
    return model(hardware=Hardware(accelerator="H20", cpus=cpus, gpus_per_node=per_node), parallel=Parallel(**parallel))


def test_a_cpu_replica_reserves_cpus_and_memory() -> None:
    asked = model(hardware=Hardware(cpus=1.5, memory_gib=2))
    options = actor_options(asked)
    assert options["num_cpus"] == 1.5
    assert options["memory"] == 2 * GIB
    assert not {"num_gpus", "accelerator_type"} & options.keys()
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
    assert bundles(asked) == []


def test_a_gpu_replica_on_one_node_is_one_reservation() -> None:
    asked = gpus(tensor=4, pipeline=2)
    options = actor_options(asked)
    assert (options["num_gpus"], options["accelerator_type"]) == (8, "H20")
    assert "memory" not in options
    assert "LD_PRELOAD" not in options["runtime_env"]["env_vars"]
    assert bundles(asked) == []
    assert reserved(asked) == {"CPU": 4, "GPU": 8} | H20


def test_a_simulated_replica_reserves_no_device() -> None:
    asked = model(hardware=Hardware(accelerator="H20", cpus=2), parallel=Parallel(tensor=4), simulated=Simulated())
    assert not {"num_gpus", "accelerator_type"} & actor_options(asked).keys()
    assert reserved(asked) == {"CPU": 2}


def test_tensor_parallel_ranks_on_cpu_each_have_their_cpus() -> None:
    asked = model(parallel=Parallel(tensor=2), hardware=Hardware(cpus=3))
    assert actor_options(asked)["num_cpus"] == 6
    assert actor_options(asked)["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert bundles(asked) == []


def test_a_data_parallel_rank_is_a_bundle() -> None:
    asked = model(parallel=Parallel(tensor=2, data=3), hardware=Hardware(cpus=1, memory_gib=6))
    assert bundles(asked) == [{"CPU": 2, "memory": 2 * GIB}] * 3
    assert [bundle_of(asked, rank) for rank in range(3)] == [0, 1, 2]
    assert reserved(asked) == {"CPU": 6, "memory": 6 * GIB}


def test_a_data_parallel_rank_on_gpus_has_its_devices_on_one_node() -> None:
    asked = gpus(data=4, tensor=2)
    assert bundles(asked) == [{"CPU": 4, "GPU": 2} | H20] * 4
    assert actor_options(asked)["num_gpus"] == 2
    assert "VLLM_RAY_BUNDLE_INDICES" not in actor_options(asked, 1)["runtime_env"]["env_vars"]


def test_expert_parallel_over_single_gpus_has_a_bundle_a_gpu() -> None:
    assert bundles(gpus(data=16, expert=True, cpus=1)) == [{"CPU": 1, "GPU": 1} | H20] * 16


def test_a_rank_that_spans_nodes_has_a_bundle_a_gpu() -> None:
    asked = gpus(tensor=8, pipeline=2)
    assert bundles(asked) == [{"CPU": 4, "GPU": 1} | H20, *[{"GPU": 1} | H20] * 15]
    # vLLM's workers take the GPUs; the actor in the first bundle leaves it to them.
    assert "num_gpus" not in actor_options(asked)
    assert reserved(asked)["GPU"] == 16


def test_ranks_that_span_nodes_each_know_their_bundles() -> None:
    asked = gpus(tensor=4, data=2, per_node=2)
    assert len(bundles(asked)) == 8
    assert bundles(asked)[bundle_of(asked, 1)] == {"CPU": 4, "GPU": 1} | H20
    indices = [actor_options(asked, rank)["runtime_env"]["env_vars"]["VLLM_RAY_BUNDLE_INDICES"] for rank in range(2)]
    assert indices == ["0,1,2,3", "4,5,6,7"]


@pytest.mark.parametrize("placement", ["pack", "spread", "strict_pack", "strict_spread"])
def test_strategies_are_rays(placement: Any) -> None:
    from ray.util.placement_group import VALID_PLACEMENT_GROUP_STRATEGIES

    assert strategy(model(hardware=Hardware(placement=placement))) in VALID_PLACEMENT_GROUP_STRATEGIES


def on_cpus(name: str, cpus: float) -> Model:
    return model(name=name, hardware=Hardware(cpus=cpus))


@pytest.mark.parametrize(
    ("free", "with_room_for"),
    [
        ({"CPU": 5.0}, {"a", "b"}),
        ({"CPU": 4.0}, {"a"}),
        # One that does not fit leaves the room to those that do.
        ({"CPU": 2.0}, {"b"}),
        ({"CPU": 1.0}, set()),
        ({}, set()),
    ],
)
def test_all_models_are_replaced_at_the_same_time(free: dict[str, float], with_room_for: set[str]) -> None:
    assert with_room((on_cpus("a", 3), on_cpus("b", 2)), free) == with_room_for


def test_a_group_needs_room_for_all_its_ranks() -> None:
    group = gpus(cpus=1, data=2)
    there = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H20": 1.0}
    assert with_room((group,), there) == {"m"}
    assert with_room((group,), there | {"GPU": 1.0}) == frozenset()


def test_resources_of_its_own_are_taken_by_each_reservation() -> None:
    own = {"engines-m": 0.001}
    alone = model(hardware=Hardware(resources=own))
    assert actor_options(alone)["resources"] == own
    assert reserved(alone) == {"CPU": 1} | own
    ranks = model(hardware=Hardware(accelerator="H20", resources=own), parallel=Parallel(tensor=8, data=2))
    assert bundles(ranks) == [{"CPU": 1, "GPU": 8} | H20 | own] * 2
    over_nodes = model(
        hardware=Hardware(accelerator="H20", gpus_per_node=1, resources=own), parallel=Parallel(tensor=2)
    )
    assert bundles(over_nodes) == [{"CPU": 1, "GPU": 1} | H20 | own, {"GPU": 1} | H20 | own]
