"""Values of the chart: an overlay's, and such as use everything that there is."""

from __future__ import annotations

import copy
import functools
from typing import Any

from hycluster.k8s.chart.defaults import values_of
from tests.k8s.kustomize import K8S, built

Resource = dict[str, Any]
# What is in k8s/cluster, overlays have not.
CLUSTER = {"priorityClasses": {"create": False}}
LARGE = "hunyuan-large-bf16"


@functools.cache
def overlay(name: str) -> list[Resource]:
    return built(K8S / "overlays" / name)


def values(name: str, **more: Any) -> dict[str, Any]:
    return values_of(copy.deepcopy(overlay(name))) | CLUSTER | more


EVERYTHING: dict[str, Any] = {
    "namespace": {"name": "llm", "create": True},
    "image": {
        "repository": "registry.example.com:5000/llm/hycluster",
        "tag": "0.1.0-gpu",
        "digest": f"sha256:{'0' * 64}",
        "pullPolicy": "Always",
    },
    "imagePullSecrets": ["registry"],
    "tokenSecretName": "ray-token",
    "hubTokenSecretName": "hub-token",
    "redis": {"enabled": False, "address": "redis.data:6380", "passwordSecret": {"name": "redis", "key": "secret"}},
    "keysDatabase": {
        "enabled": True,
        "secret": {"name": "keys", "key": "url"},
        "cidrs": ["203.0.113.9/32"],
        "port": 6432,
    },
    "weights": {"size": "3Ti", "storageClassName": "shared"},
    "hosts": {"http": ["a.example.com", "b.example.com"], "grpc": ["c.example.com"]},
    "gateway": {"enabled": True, "name": "edge", "namespace": "edge"},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "tlsSecretName": "tls",
        "annotations": {"nginx.ingress.kubernetes.io/auth-url": "https://auth.example.com"},
    },
    "metrics": {"enabled": True, "namespace": "prometheus", "labels": {"release": "prometheus"}},
    "networkPolicies": {
        "clients": [{"namespaceLabels": {"team": "search"}, "podLabels": {"app": "answers"}}],
        "apiServerCidrs": ["203.0.113.7/32"],
    },
    "rdma": {"enabled": True, "resource": "rdma/hca"},
    "gangScheduling": True,
    "terminationGracePeriodSeconds": 600,
}


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """As Helm merges values files."""
    made = dict(values)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = merged(made[key], value) if both else value
    return made


def everything() -> dict[str, Any]:
    given = merged(values(LARGE, priorityClasses={"create": True}), EVERYTHING)
    given["settings"]["batches"] = {"store": "s3://bucket/batches"}
    return given
