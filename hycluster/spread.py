"""Doors on different nodes: what Ray is asked for, so that the loss of one node does not take all doors.

Ray Serve deals replicas out over nodes in turn and does not look at what a node has already: after a loss, or when
nodes come late, all doors sit on one, and stay. Its ``max_replicas_per_node`` is a bound that holds, but counts a
door's successor too: with as many nodes as doors a replacement would wait for ever for a node more. So each *edition*
of the doors, which is all that one deployment of the application starts, has a bound of its own. A door that finds no
node waits for one and serves from there; Ray's autoscaler is told of it as of any other.

Pinned to Ray 2.60.0: a resource of this prefix, of which each node has 1 by itself, is how Serve keeps its own bound.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping

import ray
from ray._raylet import IMPLICIT_RESOURCE_PREFIX  # type: ignore[attr-defined]

from hycluster.settings.settings import Settings

# Ray counts resources in steps of this size, and drops what is below.
STEPS = 10_000


def door_nodes(settings: Settings) -> int:
    """How many nodes of this Ray cluster can hold a door; 0 outside of one."""
    nodes = ray.nodes() if ray.is_initialized() else []
    return sum(node["Alive"] and _holds(node["Resources"], settings.door_resources) for node in nodes)


def _holds(there: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(there.get(resource, 0.0) >= amount for resource, amount in wanted.items())


def doors_per_node(settings: Settings, nodes: int) -> int | None:
    """Most doors of one edition on one node; None if there is no bound, as where there is only one node.

    Args:
        nodes: how many can hold a door.
    """
    most = settings.doors_per_node
    if most is None and nodes > 1:
        most = math.ceil(settings.doors / nodes)
    return most if most is not None and most < settings.doors else None


def door_resources(settings: Settings, nodes: int, edition: str | None = None) -> dict[str, float]:
    """What each door of one edition reserves, by Ray's names of custom resources.

    Args:
        edition: a name that no earlier deployment of the application had; by default a random one.
    """
    most = doors_per_node(settings, nodes)
    if most is None:
        return dict(settings.door_resources)
    name = f"{IMPLICIT_RESOURCE_PREFIX}hycluster-door-{edition or secrets.token_hex(4)}"
    return settings.door_resources | {name: math.floor(STEPS / most) / STEPS}
