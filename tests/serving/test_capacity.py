"""What no nodes can hold is refused; what some can hold is not."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.serving.capacity import GIB, check_places
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from tests.replica.placed_model import model

H20 = {"accelerator_type:H20": 1.0}


def cpus(*counts: float) -> list[dict[str, float]]:
    return [{"CPU": count, "memory": 64.0 * GIB} for count in counts]


@pytest.mark.parametrize(
    ("asked", "nodes"),
    [
        (model(cpus=1, replicas=2), cpus(2)),
        (model(cpus=0.1, replicas=20), cpus(2)),
        (model(cpus=2, replicas=3), cpus(4, 3)),
        (model(parallel=Parallel(data=2, expert=True), cpus=3), cpus(3, 3)),
        (model(parallel=Parallel(data=2, expert=True), cpus=3, placement="strict_spread"), cpus(3, 4)),
        (model(parallel=Parallel(data=2, expert=True), cpus=2, placement="strict_pack"), cpus(1, 4)),
        (model(accelerator="H20", parallel=Parallel(tensor=8)), [{"CPU": 8, "GPU": 8, **H20}]),
    ],
)
def test_what_has_a_place(asked: Model, nodes: list[dict[str, float]]) -> None:
    check_places([asked], nodes)


@pytest.mark.parametrize(
    ("asked", "nodes", "says"),
    [
        (
            model(cpus=5),
            cpus(4, 4),
            "models: m: hardware.cpus: one process asks for 5 CPUs; the largest node of this Ray cluster has 4 CPU",
        ),
        (
            model(cpus=2, replicas=3),
            cpus(3, 3),
            "3 processes of 2 CPUs each are asked for; the nodes of this Ray cluster have room for 2 (CPU: 3, 3)",
        ),
        (
            model(parallel=Parallel(data=2, expert=True), cpus=3, placement="strict_pack"),
            cpus(4, 4),
            "models: m: hardware.cpus: one node must hold 6 CPUs; the largest node of this Ray cluster has 4 CPU",
        ),
        (
            model(parallel=Parallel(data=2, expert=True), cpus=1, placement="strict_spread"),
            cpus(8),
            "'strict_spread' asks for 2 nodes a replica; this Ray cluster has 1 that are large enough",
        ),
        (
            model(cpus=1, memory_gib=100),
            cpus(8, 8),
            "one process asks for 1 CPUs and 100 memory GiB; the largest node of this Ray cluster has 64 memory",
        ),
        (
            model(accelerator="H20", cpus=1, parallel=Parallel(tensor=8)),
            [{"CPU": 8, "GPU": 4, **H20}] * 2,
            "one process asks for 1 CPUs and 8 GPUs; the largest node of this Ray cluster has 4 GPU",
        ),
    ],
)
def test_what_has_none_is_named(asked: Model, nodes: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_places([asked], nodes)
    assert says in caught.value.message
    assert caught.value.message.startswith("models: m: ")
