from __future__ import annotations

from typing import Any

import pytest
import ray
from ray._raylet import IMPLICIT_RESOURCE_PREFIX  # type: ignore[attr-defined]

from hycluster.settings.ingress import Ingress
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.spread import ingress_nodes, ingress_per_node, ingress_resources


def settings(**fields: Any) -> Settings:
    return Settings(models=(Model(name="m", source="/m"),), batches=None, ingress=Ingress(**fields))


@pytest.mark.parametrize(
    ("ingresses", "asked", "nodes", "most"),
    [
        # A laptop, and where nobody knows of nodes: as ever.
        (1, None, 1, None),
        (2, None, 1, None),
        (2, None, 0, None),
        # As even as can be.
        (2, None, 2, 1),
        (2, None, 5, 1),
        (3, None, 2, 2),
        (7, None, 3, 3),
        # A lone ingress process has nothing to be kept from.
        (1, None, 3, None),
        (1, 1, 3, None),
        # What is asked for holds, whatever nodes there are now.
        (2, 1, 1, 1),
        (2, 1, 0, 1),
        (4, 2, 4, 2),
        (2, 2, 4, None),
    ],
)
def test_ingress_processes_per_node(ingresses: int, asked: int | None, nodes: int, most: int | None) -> None:
    assert ingress_per_node(settings(replicas=ingresses, replicas_per_node=asked), nodes) == most


@pytest.mark.parametrize("most", range(1, 64))
def test_a_node_holds_as_many_as_asked_for_and_no_more(most: int) -> None:
    resources = ingress_resources(settings(replicas=64, replicas_per_node=most, resources={"ingress": 0.1}), 9, "e")
    assert resources.pop("ingress") == 0.1
    (name, each), *others = resources.items()
    assert not others
    assert name.startswith(IMPLICIT_RESOURCE_PREFIX)
    # In Ray's own whole steps, of which a node has 10,000.
    steps = int(each * 10_000)
    assert most * steps <= 10_000 < (most + 1) * steps


def test_each_edition_has_a_bound_of_its_own() -> None:
    two = settings(replicas=2, replicas_per_node=1)
    assert ingress_resources(two, 2).keys() != ingress_resources(two, 2).keys()
    assert ingress_resources(settings(replicas=2, resources={"ingress": 0.5}), 1) == {"ingress": 0.5}


def test_nodes_that_can_hold_an_ingress_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    anywhere, there = settings(), settings(resources={"ingress": 0.5})
    assert ingress_nodes(anywhere) == 0
    nodes = [
        {"Alive": True, "Resources": {"CPU": 0.0}},
        {"Alive": True, "Resources": {"CPU": 1.0, "ingress": 1.0}},
        {"Alive": False, "Resources": {"ingress": 1.0}},
        {"Alive": True, "Resources": {"ingress": 0.25}},
    ]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert (ingress_nodes(anywhere), ingress_nodes(there)) == (3, 1)
