"""How many pods the settings want, how large they are and how long they may take to end.

Pure functions of the settings: ``render`` writes what they say into an overlay, and a rule finds what is below it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from hycluster.errors import SettingsError
from hycluster.replica.placement import on_gpus, reserved
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings

# What Serve gives a deployment to end beyond drain_timeout_s, see hycluster/app.py.
SERVE_MARGIN_S = 15
# From Serve's end to Ray's: what is left is moving, not work.
RAY_MARGIN_S = 15
# Until all who balance have heard that an ingress process takes no more, and Ray's processes have ended.
PRE_STOP_S = 5
STOP_MARGIN_S = 15
# Memory of a pod beyond what the settings name: Ray's own processes, and of an engine that says nothing of its own.
RAY_GIB = 2
CPU_ENGINE_GIB = 4
GPU_HOST_GIB = 32
# Share of a group's resource of its own that each reservation takes: enough for a thousand of them.
SHARE = 0.001
# Labels of nodes by NVIDIA's operator (GPU feature discovery), for Ray's names of accelerators that come in one kind.
PRODUCTS = {
    "H20": "NVIDIA-H20",
    "H100": "NVIDIA-H100-80GB-HBM3",
    "H200": "NVIDIA-H200",
    "B200": "NVIDIA-B200",
    "L4": "NVIDIA-L4",
    "L40S": "NVIDIA-L40S",
}
PRODUCT_LABEL = "nvidia.com/gpu.product"


@dataclass(frozen=True)
class PodGroup:
    """A group of engine pods: those of one model. A replica is one pod, or one on each of several hosts.

    Attributes:
        name: of the worker group.
        least, first, most: replicas; at the most one more than the settings want, for a successor.
        hosts: pods of a replica.
        cpus, gpus, memory_gib: of a pod.
        resources: what Ray is told that such a pod has; empty where Ray sees it by itself.
        node_selector: labels of the nodes.
    """

    name: str
    model: str
    least: int
    first: int
    most: int
    hosts: int
    cpus: int
    gpus: int
    memory_gib: int
    resources: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)


def drain_s(settings: Settings) -> int:
    """What Ray gives a node to drain (``RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S``)."""
    return math.ceil(settings.drain_timeout_s) + SERVE_MARGIN_S + RAY_MARGIN_S


def grace_s(settings: Settings) -> int:
    """What Kubernetes gives a pod to end."""
    return PRE_STOP_S + drain_s(settings) + STOP_MARGIN_S


def deletion_delay_s(settings: Settings) -> int:
    """How long an old cluster lives when the next one has taken over: it is removed head and all, without a drain."""
    return math.ceil(settings.drain_timeout_s) + SERVE_MARGIN_S


def stored_remotely(settings: Settings) -> bool:
    """Whether ingress processes need an object store's credentials, and a way there."""
    return settings.batches is not None and (settings.batches.store or "").startswith("s3://")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")


def own_resource(model: str) -> str:
    """Ray's name of what only one model's pods have."""
    return f"engines-{slug(model)}"


def groups(settings: Settings) -> list[PodGroup]:
    """One for each model.

    Raises:
        SettingsError: a model can't be laid over pods, or its nodes can't be told.
    """
    several = len(settings.models) > 1
    kinds = {on_gpus(model) for model in settings.models if model.simulated is None}
    if len(kinds) > 1:
        raise SettingsError("models: some are on GPUs and some on CPU; an image has the one vLLM or the other")
    names = [slug(model.name) for model in settings.models]
    if clash := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"models: two names become {clash!r} as names of pods; they must differ there too")
    return [_group(model, several) for model in settings.models]


def _group(model: Model, several: bool) -> PodGroup:
    hosts, gpus, ranks = _layout(model)
    reserved_cpus = math.ceil(reserved(model)["CPU"] / hosts)
    cpus, memory = _host(model, reserved_cpus, gpus, ranks, hosts)
    resources = {}
    if several or gpus:
        resources["CPU"] = str(cpus)
    if gpus:
        resources |= {"GPU": str(gpus), f"accelerator_type:{model.hardware.accelerator}": "1"}
    if several:
        resources[own_resource(model.name)] = "1"
    return PodGroup(
        name=own_resource(model.name) if several else "engines",
        model=model.name,
        least=model.replicas.min,
        first=model.replicas.count,
        most=model.replicas.most + 1,
        hosts=hosts,
        cpus=cpus,
        gpus=gpus,
        memory_gib=memory,
        resources=resources,
        node_selector=_nodes(model) if gpus else dict(model.hardware.node_selector),
    )


def _layout(model: Model) -> tuple[int, int, int]:
    """Of a replica: its hosts; of a host: GPUs and data-parallel ranks (1 also where a rank takes several hosts)."""
    parallel, hardware = model.parallel, model.hardware
    apart = hardware.placement in ("spread", "strict_spread")
    if not on_gpus(model):
        hosts = parallel.data if apart else 1
        return hosts, 0, parallel.data // hosts
    each = parallel.devices_per_rank
    if each > hardware.gpus_per_node:
        if each % hardware.gpus_per_node:
            raise SettingsError(
                f"models: {model.name}: parallel: {each} GPUs a rank; on pods they must be a multiple of"
                f" hardware.gpus_per_node ({hardware.gpus_per_node})"
            )
        return parallel.data * each // hardware.gpus_per_node, hardware.gpus_per_node, 1
    together = 1 if apart else hardware.gpus_per_node // each
    hosts = math.ceil(parallel.data / together)
    if hardware.placement == "strict_pack" and hosts > 1:
        raise SettingsError(
            f"models: {model.name}: hardware.placement: strict_pack needs {parallel.data * each} GPUs on a node;"
            f" hardware.gpus_per_node is {hardware.gpus_per_node}"
        )
    if parallel.data % hosts:
        raise SettingsError(
            f"models: {model.name}: parallel.data: {parallel.data} ranks can't be dealt out evenly to {hosts} pods;"
            f" must be a multiple of {together}"
        )
    return hosts, parallel.data // hosts * each, parallel.data // hosts


def _host(model: Model, reserved_cpus: int, gpus: int, ranks: int, hosts: int) -> tuple[int, int]:
    """CPUs and GiB of a pod: what the replica reserves, and what works beside it."""
    hardware = model.hardware
    memory = (hardware.kv_offload_gib or 0) * ranks
    if gpus:
        # vLLM has a process a GPU besides, which Ray does not count, and reads weights by more threads than those.
        share = RAY_GIB + hardware.memory_gib / hosts if hardware.memory_gib else GPU_HOST_GIB * gpus
        return 2 * reserved_cpus, math.ceil(memory + share)
    memory += hardware.kv_cache_gib * model.parallel.devices_per_rank * ranks
    return reserved_cpus + 1, math.ceil(memory + RAY_GIB + (hardware.memory_gib or CPU_ENGINE_GIB) / hosts)


def _nodes(model: Model) -> dict[str, str]:
    hardware = model.hardware
    if hardware.node_selector:
        return dict(hardware.node_selector)
    product = PRODUCTS.get(str(hardware.accelerator))
    if product is None:
        raise SettingsError(
            f"models: {model.name}: hardware.node_selector: must be set for accelerator {hardware.accelerator!r};"
            f" only {', '.join(PRODUCTS)} are told by one label ({PRODUCT_LABEL})"
        )
    return {PRODUCT_LABEL: product}
