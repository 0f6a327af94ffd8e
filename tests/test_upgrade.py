from __future__ import annotations

import pytest

from hycluster.config import Grpc, Http, Parallel, Settings
from hycluster.door import DoorAddresses
from hycluster.upgrade import _same_ports, with_room
from tests.placed_model import model

DOORS = DoorAddresses("http://127.0.0.1:8123", "127.0.0.1:9123")


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
    assert with_room((model("a", cpus=3), model("b", cpus=2)), free) == with_room_for


def test_a_group_needs_room_for_all_its_ranks() -> None:
    group = model(parallel=Parallel(data=2), accelerator="H20", cpus=1)
    there = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H20": 1.0}
    assert with_room((group,), there) == {"m"}
    assert with_room((group,), there | {"GPU": 1.0}) == frozenset()


def test_a_free_port_is_the_one_that_is_open() -> None:
    settings = Settings(models=(model(),), http=Http(port=0), grpc=Grpc(port=0))
    same = _same_ports(settings, DOORS)
    assert (same.http.port, same.grpc.port) == (8123, 9123)


def test_a_port_that_is_given_is_taken() -> None:
    settings = Settings(models=(model(),), http=Http(port=1), grpc=Grpc(port=2))
    assert _same_ports(settings, DOORS) == settings
