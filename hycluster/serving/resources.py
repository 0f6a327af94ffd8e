"""Refuses settings that the Ray cluster this process has joined has no place for, before anything starts."""

from __future__ import annotations

import logging

import ray

from hycluster.errors import SettingsError
from hycluster.replica.placement import on_gpus, reserved
from hycluster.serving.capacity import check_places
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.spread import ingress_nodes, ingress_per_node

logger = logging.getLogger(__name__)

GIB = 1 << 30


def check_resources(models: tuple[Model, ...]) -> None:
    """Refuse settings that this cluster can't hold, before anything starts. Counts what is to be there at first.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    there = ray.cluster_resources()
    wanted = {
        resource: sum(reserved(m).get(resource, 0.0) * m.replicas.count for m in models)
        for resource in ("CPU", "GPU", "memory")
    }
    for resource, field, unit in (
        ("CPU", "hardware.cpus", 1),
        ("GPU", "hardware.accelerator", 1),
        ("memory", "hardware.memory_gib", GIB),
    ):
        if wanted[resource] > there.get(resource, 0.0):
            raise SettingsError(
                f"models: {field}: all replicas together ask for {wanted[resource] / unit:g} {resource}"
                f"{' GiB' if unit == GIB else 's'}; this Ray cluster has {there.get(resource, 0.0) / unit:g}"
            )
    for model in models:
        accelerator = model.hardware.accelerator
        if model.replicas.count and on_gpus(model) and f"accelerator_type:{accelerator}" not in there:
            kinds = sorted(name.split(":", 1)[1] for name in there if name.startswith("accelerator_type:"))
            raise SettingsError(
                f"models: {model.name}: hardware.accelerator: {accelerator!r} is not in this Ray cluster;"
                f" there are {kinds or 'none'}"
            )
    check_places(models, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def check_ingress(settings: Settings) -> None:
    """Refuse ingress processes that this cluster has no place for.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    there = ray.cluster_resources()
    for resource, amount in settings.ingress.resources.items():
        if settings.ingress.replicas * amount > there.get(resource, 0.0):
            raise SettingsError(
                f"ingress.resources: {resource}: all ingress processes together ask for"
                f" {settings.ingress.replicas * amount:g};"
                f" this Ray cluster has {there.get(resource, 0.0):g}"
            )
    nodes = ingress_nodes(settings)
    if (most := ingress_per_node(settings, nodes)) is not None and nodes * most < settings.ingress.replicas:
        # Not refused: nodes may come late.
        logger.warning(
            "ingress.replicas_per_node: %d on each of %d nodes that can hold one; %d of %d wait",
            most, nodes, settings.ingress.replicas - nodes * most, settings.ingress.replicas,
        )  # fmt: skip


def check_batches(settings: Settings) -> None:
    """Refuse a Batch API whose process no node has a place for.

    Raises:
        SettingsError: names the resource, what is asked for and what there is.
    """
    if settings.batches is None:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, amount in settings.batches.resources.items():
        most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        if amount > most:
            raise SettingsError(
                f"batches.resources: {resource}: {amount:g} is not to be had; the node of this Ray cluster that has"
                f" most of it has {most:g}"
            )
