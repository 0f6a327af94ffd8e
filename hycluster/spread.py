"""Ingress processes on different nodes: what Ray is asked for, so that the loss of one node does not take all ingress
processes.

Ray Serve deals replicas out over nodes in turn and does not look at what a node has already: after a loss, or when
nodes come late, all ingress processes sit on one, and stay. Its ``max_replicas_per_node`` is a bound that holds, but
counts an ingress process's successor too: with as many nodes as ingress processes a replacement would wait for ever for
a node more. So each *edition* of the ingress processes, which is all that one deployment of the application starts, has
a bound of its own. An ingress process that finds no node waits for one and serves from there; Ray's autoscaler is told
of it as of any other.

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


def ingress_nodes(settings: Settings) -> int:
    """How many nodes of this Ray cluster can hold an ingress process; 0 outside of one."""
    nodes = ray.nodes() if ray.is_initialized() else []
    return sum(node["Alive"] and _holds(node["Resources"], settings.ingress.resources) for node in nodes)


def _holds(there: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(there.get(resource, 0.0) >= amount for resource, amount in wanted.items())


def ingress_per_node(settings: Settings, nodes: int) -> int | None:
    """Most ingress processes of one edition on one node; None if there is no bound, as where there is only one node.

    Args:
        nodes: how many can hold an ingress process.
    """
    most = settings.ingress.replicas_per_node
    if most is None and nodes > 1:
        most = math.ceil(settings.ingress.replicas / nodes)
    return most if most is not None and most < settings.ingress.replicas else None


def ingress_resources(settings: Settings, nodes: int, edition: str | None = None) -> dict[str, float]:
    """What each ingress process of one edition reserves, by Ray's names of custom resources.

    Args:
        edition: a name that no earlier deployment of the application had; by default a random one.
    """
    most = ingress_per_node(settings, nodes)
    if most is None:
        return dict(settings.ingress.resources)
    name = f"{IMPLICIT_RESOURCE_PREFIX}hycluster-ingress-process-{edition or secrets.token_hex(4)}"
    return settings.ingress.resources | {name: math.floor(STEPS / most) / STEPS}
