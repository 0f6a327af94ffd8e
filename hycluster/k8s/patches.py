"""What the settings say of pods, as kustomize takes it: a patch of the base's RayService, and what stands beside."""

from __future__ import annotations

from typing import Any

from hycluster.k8s.pods import ROLE
from hycluster.k8s.sizes import PodGroup, drain_s, grace_s, groups, stored_remotely
from hycluster.settings.settings import Settings

GROUPS = "/spec/rayClusterConfig/workerGroupSpecs"
GROUP_LABEL = "hycluster/group"
GPU = "nvidia.com/gpu"
# Of the object store that batches.store names: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what else it takes.
STORE_SECRET = "hycluster-s3"
Op = dict[str, Any]


def pods_patch(settings: Settings) -> list[Op]:
    """Operations on the base's RayService, whose groups are ingress and engines; they come after all components' own.

    The groups of further models are copies of the engines' group, made before anything is changed in it.
    """
    engines = groups(settings)
    ops = [_test("0/groupName", "ingress"), _test("1/groupName", "engines")]
    ops += [{"op": "copy", "from": f"{GROUPS}/1", "path": f"{GROUPS}/{at}"} for at in range(2, len(engines) + 1)]
    # One more ingress process than there are, so that a lost one's pod is not waited for.
    ops += _sizes(0, settings.ingress.replicas, settings.ingress.replicas, settings.ingress.replicas + 1)
    ops += _ends(0, settings)
    if stored_remotely(settings):
        # A service account that the store trusts does as well, so it may be missing.
        secret = {"secretRef": {"name": STORE_SECRET, "optional": True}}
        ops.append({"op": "add", "path": f"{GROUPS}/0/template/spec/containers/0/envFrom", "value": [secret]})
    for at, group in enumerate(engines, 1):
        ops += _engines(at, group, several=len(engines) > 1)
        ops += _ends(at, settings)
    return ops


def _engines(at: int, group: PodGroup, *, several: bool) -> list[Op]:
    ops = _sizes(at, group.least, group.first, group.most)
    if group.hosts > 1:
        # Whole replicas come and go, never one of their hosts.
        ops.append(_add(f"{at}/numOfHosts", group.hosts))
    if several:
        ops.append(_add(f"{at}/groupName", group.name))
        ops.append(_add(f"{at}/template/metadata/labels/{_key(GROUP_LABEL)}", group.name))
    if group.resources:
        # The autoscaler must know what a node of this group will have before there is one.
        ops.append(_add(f"{at}/resources", group.resources))
    container = f"{at}/template/spec/containers/0/resources"
    size = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        size[GPU] = str(group.gpus)
    ops += [_add(f"{container}/{bound}/{_key(k)}", v) for bound in ("requests", "limits") for k, v in size.items()]
    if group.node_selector:
        ops.append(_add(f"{at}/template/spec/nodeSelector", group.node_selector))
    return ops


def _sizes(at: int, least: int, first: int, most: int) -> list[Op]:
    return [_add(f"{at}/minReplicas", least), _add(f"{at}/replicas", first), _add(f"{at}/maxReplicas", most)]


def _ends(at: int, settings: Settings) -> list[Op]:
    """Serve drains, then Ray ends, and only then does Kubernetes kill."""
    env = f"{at}/template/spec/containers/0/env/0"
    return [
        _test(f"{env}/name", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"),
        _add(f"{env}/value", str(drain_s(settings)), op="replace"),
        _add(f"{at}/template/spec/terminationGracePeriodSeconds", grace_s(settings)),
    ]


def _add(path: str, value: Any, op: str = "add") -> Op:
    return {"op": op, "path": f"{GROUPS}/{path}", "value": value}


def _test(path: str, value: Any) -> Op:
    """kustomize stops if it is not so: patches go by order."""
    return _add(path, value, op="test")


def _key(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def beside(settings: Settings, name: str) -> list[dict[str, Any]]:
    """Budgets, and the way to the object store, if there is one.

    Kubernetes knows no controller with a size behind Ray's pods, so a number of ``minAvailable`` is all that a budget
    may say of them. Of several, one at a time may go; the only one stays until somebody decides. A model that may
    sleep has no budget.
    """
    engines = groups(settings)
    made = [_budget(f"{name}-ingress", {ROLE: "ingress"}, settings.ingress.replicas, 1)]
    for group in engines:
        labels = {ROLE: "engines"} | ({GROUP_LABEL: group.name} if len(engines) > 1 else {})
        if group.least:
            made.append(_budget(f"{name}-{group.name}", labels, group.least * group.hosts, group.hosts))
    if stored_remotely(settings):
        made.append(_way_to_the_store(name))
    return made


def _budget(name: str, labels: dict[str, str], pods: int, at_once: int) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name},
        "spec": {"minAvailable": max(pods - at_once, 0) or pods, "selector": {"matchLabels": labels}},
    }


def _way_to_the_store(name: str) -> dict[str, Any]:
    anywhere = [
        # What a cloud tells its machines, credentials too, is not the store.
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
        {"ipBlock": {"cidr": "::/0"}},
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": f"{name}-batches",
            "annotations": {"hycluster/egress": "batches.store, the object store of the Batch API"},
        },
        "spec": {
            "podSelector": {"matchLabels": {ROLE: "ingress"}},
            "policyTypes": ["Egress"],
            "egress": [{"to": anywhere, "ports": [{"port": 443}]}],
        },
    }
