"""What Ray reserves for one replica, and how that lies on nodes. Pure functions of a model's settings.

A replica is one actor, or several: an actor a data-parallel rank. An actor's reservation is a bundle, and a bundle
lies on one node. The ranks of tensor and pipeline parallelism are processes below the actor and use its bundle; only
where they do not fit a node (the ``ray`` executor) does each GPU get a bundle of its own, and vLLM an actor in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hycluster.engine.arguments import GIB, engine_environment, executor
from hycluster.settings.model import Model


def on_gpus(model: Model) -> bool:
    """Whether this model's engines need GPUs."""
    return model.hardware.accelerator is not None and model.simulated is None


def actor_options(model: Model, rank: int = 0) -> dict[str, Any]:
    """Options of the actor that holds a replica's engine, or one data-parallel rank of it."""
    options: dict[str, Any] = {"num_cpus": _cpus(model), "runtime_env": {"env_vars": _environment(model, rank)}}
    if on_gpus(model) and not _spans_nodes(model):
        options["num_gpus"] = model.parallel.devices_per_rank
        options["accelerator_type"] = model.hardware.accelerator
    if model.hardware.memory_gib is not None:
        options["memory"] = int(model.hardware.memory_gib * GIB) // model.parallel.data
    if model.hardware.resources:
        options["resources"] = dict(model.hardware.resources)
    return options


def bundles(model: Model) -> list[dict[str, float]]:
    """The reservations of a replica, rank by rank; empty if one actor's options say it all."""
    each = _rank_bundles(model)
    return each * model.parallel.data if len(each) * model.parallel.data > 1 else []


def bundle_of(model: Model, rank: int) -> int:
    """Index of the bundle that the actor of a data-parallel rank goes to."""
    return rank * (model.parallel.devices_per_rank if _spans_nodes(model) else 1)


def strategy(model: Model) -> str:
    """Ray's name of how the bundles lie on nodes."""
    return model.hardware.placement.upper()


def reserved(model: Model) -> dict[str, float]:
    """All that a replica takes of the cluster, by Ray's names (``CPU``, ``GPU``, ``memory`` in bytes)."""
    total: dict[str, float] = {}
    for bundle in _rank_bundles(model) * model.parallel.data:
        for resource, amount in bundle.items():
            total[resource] = total.get(resource, 0.0) + amount
    return total


def with_room(models: tuple[Model, ...], free: Mapping[str, float]) -> frozenset[str]:
    """Models whose pools may be one replica larger while they are replaced, all at the same time.

    Args:
        free: what the cluster has to give, by Ray's names of resources.
    """
    left, found = dict(free), set()
    for model in models:
        wanted = reserved(model)
        if all(left.get(resource, 0.0) >= amount for resource, amount in wanted.items()):
            found.add(model.name)
            for resource, amount in wanted.items():
                left[resource] -= amount
    return frozenset(found)


def _rank_bundles(model: Model) -> list[dict[str, float]]:
    options = actor_options(model)
    first: dict[str, float] = {"CPU": options["num_cpus"]}
    if "memory" in options:
        first["memory"] = options["memory"]
    first |= model.hardware.resources
    if not on_gpus(model):
        return [first]
    # As Ray itself asks for an accelerator type: a little of a resource of that name.
    kind = {f"accelerator_type:{model.hardware.accelerator}": 0.001}
    if not _spans_nodes(model):
        return [first | {"GPU": model.parallel.devices_per_rank} | kind]
    gpu = {"GPU": 1.0} | kind | model.hardware.resources
    return [first | gpu] + [gpu] * (model.parallel.devices_per_rank - 1)


def _spans_nodes(model: Model) -> bool:
    return on_gpus(model) and executor(model) == "ray"


def _cpus(model: Model) -> float:
    ranks_here = 1 if on_gpus(model) or model.simulated is not None else model.parallel.devices_per_rank
    return model.hardware.cpus * ranks_here


def _environment(model: Model, rank: int) -> dict[str, str]:
    environment = engine_environment(model)
    if _spans_nodes(model):
        first = bundle_of(model, rank)
        indices = range(first, first + model.parallel.devices_per_rank)
        environment["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, indices))
    return environment
