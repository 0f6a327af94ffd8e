"""Where the chart's values go in the manifests: the one list of what of ``k8s/base`` and ``k8s/components`` varies.

All that is not named here is as it is in those files. A path that leads nowhere any more is an error, and so is a
component that nobody has decided on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hycluster.k8s.chart.nodes import Block, Each, IfAny, Lines, Scalar, When

# Each component of k8s/components by its condition; None: it is for jobs, its patches are values here, or it is applied
# by itself.
COMPONENTS: dict[str, str | None] = {
    "gang-scheduling": "$.Values.gangScheduling",
    "gateway-routes": "$.Values.gateway.enabled",
    "gpu": None,
    "hub-egress": "$.Values.hubEgress",
    "keys-database": "$.Values.keysDatabase.enabled",
    "kueue": None,
    "monitoring": None,
    "name-references": None,
    "pull-secret": None,
    "rdma": "$.Values.rdma.enabled",
    "rdma-ipc-lock": "and $.Values.rdma.enabled $.Values.rdma.ipcLock",
    "service-monitor": "$.Values.metrics.enabled",
    "weights": "$.Values.weights.enabled",
}
# What else patches k8s/cluster.
CLUSTER_PATCHES = {"cluster-ipc-lock": "and $.Values.rdma.enabled $.Values.rdma.ipcLock"}
RAY = "RayService/hycluster/spec/rayClusterConfig"
HEAD = f"{RAY}/headGroupSpec"
INGRESS = f"{RAY}/workerGroupSpecs/ingress"
ENGINES = f"{RAY}/workerGroupSpecs/engines"
REDIS = "StatefulSet/hycluster-redis/spec"
FROM = "spec/ingress/0/from/0"
NAMESPACE = "namespaceSelector/matchLabels/kubernetes.io~1metadata.name"
DRAIN = "env/RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S/value"
# The group that there is one of for each model.
GROUP, GROUP_NAME = ENGINES, Scalar("$group.name")
EACH_GROUP = '$group := include "hycluster.groups" $ | fromYamlArray'
ANY_STORE = 'include "hycluster.remoteStore" $'
CLAIM = "PersistentVolumeClaim/hycluster-weights"

# Manifests that are there on a condition; those of components have their component's, if they are not here.
RESOURCES = {
    "Namespace/hycluster": "$.Values.namespace.create",
    "PriorityClass/hycluster-control": "$.Values.priorityClasses.create",
    "PriorityClass/hycluster-engines": "$.Values.priorityClasses.create",
    "PriorityClass/hycluster-jobs": "$.Values.priorityClasses.create",
    "Service/hycluster-redis": "$.Values.redis.enabled",
    "StatefulSet/hycluster-redis": "$.Values.redis.enabled",
    "NetworkPolicy/hycluster-redis": "$.Values.redis.enabled",
    "NetworkPolicy/hycluster-batches": ANY_STORE,
    "NetworkPolicy/hycluster-ingress-controller": "$.Values.ingress.enabled",
    "ConfigMap/hycluster-weights": "$.Values.weights.enabled",
    "Ingress/hycluster": "$.Values.ingress.enabled",
    "Ingress/hycluster-grpc": "$.Values.ingress.enabled",
}
# Manifests that there is one of for each group, on a condition.
PER_GROUP = {"PodDisruptionBudget/hycluster-engines": "gt (int $group.minReplicas) 0"}
# What overlays bring, each its own.
WEIGHTS = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "hycluster-weights"},
    "data": {
        "REPO": Scalar("$.Values.weights.repo"),
        "REVISION": Scalar("$.Values.weights.revision"),
        "FOLDER": Scalar("$.Values.weights.folder"),
    },
}


def labels(whose: str) -> Callable[[Any], Block]:
    """Of pods that somebody else has made. A default among the values would be merged with what is given."""
    name = {"ingress": "ingress-nginx", "metrics": "prometheus"}[whose]
    return lambda _: Block(f'$.Values.{whose}.podLabels | default (dict "app.kubernetes.io/name" "{name}")')


def unless_authenticated(filters: Any) -> When:
    return When("not $.Values.gateway.authenticatedBy", filters)


# In place of what is there; a function is given what is there.
REPLACED: dict[str, Any] = {
    f"{RAY}/authOptions/secretName": Scalar("$.Values.tokenSecretName"),
    f"{RAY}/gcsFaultToleranceOptions/redisAddress": lambda own: When(
        "$.Values.redis.enabled", own, Scalar("$.Values.redis.address")
    ),
    f"{RAY}/gcsFaultToleranceOptions/redisPassword/valueFrom/secretKeyRef": Block("$.Values.redis.passwordSecret"),
    f"{RAY}/autoscalerOptions/idleTimeoutSeconds": Scalar("$.Values.autoscaler.idleTimeoutSeconds"),
    f"{RAY}/autoscalerOptions/resources": Block("$.Values.autoscaler.resources"),
    f"{HEAD}/template/spec/containers/ray-head/resources": Block("$.Values.head.resources"),
    f"{INGRESS}/replicas": Scalar('include "hycluster.ingressReplicas" $ | int'),
    f"{INGRESS}/minReplicas": Scalar('include "hycluster.ingressReplicas" $ | int'),
    f"{INGRESS}/maxReplicas": Scalar('include "hycluster.ingressReplicas" $ | int | add1'),
    f"{INGRESS}/template/spec/terminationGracePeriodSeconds": Scalar('include "hycluster.grace" $ | int'),
    f"{INGRESS}/template/spec/containers/ray-worker/{DRAIN}": Scalar('include "hycluster.drain" $'),
    f"{INGRESS}/template/spec/containers/ray-worker/resources": Block("$.Values.ingressPods.resources"),
    f"{INGRESS}/template/spec/containers/ray-worker/env/HYCLUSTER_AUTH_DATABASE/valueFrom/secretKeyRef": Block(
        "$.Values.keysDatabase.secret"
    ),
    "NetworkPolicy/hycluster-keys-database/spec/egress/0/to": [
        Each("$cidr := $.Values.keysDatabase.cidrs", {"ipBlock": {"cidr": Scalar("$cidr")}})
    ],
    "NetworkPolicy/hycluster-keys-database/spec/egress/0/ports/0/port": Scalar("$.Values.keysDatabase.port | int"),
    f"{ENGINES}/replicas": Scalar("$group.replicas"),
    f"{ENGINES}/minReplicas": Scalar("$group.minReplicas"),
    f"{ENGINES}/maxReplicas": Scalar("$group.maxReplicas"),
    f"{ENGINES}/template/spec/terminationGracePeriodSeconds": Scalar('include "hycluster.grace" $ | int'),
    f"{ENGINES}/template/spec/containers/ray-worker/{DRAIN}": Scalar('include "hycluster.drain" $'),
    f"{ENGINES}/template/spec/containers/ray-worker/resources": Block("$group.resources"),
    f"{ENGINES}/template/spec/volumes/shared-mem/emptyDir/sizeLimit": Scalar("$group.sharedMemory"),
    f"{ENGINES}/template/spec/initContainers/fetch-weights/env/HF_TOKEN/valueFrom/secretKeyRef/name": Scalar(
        "$.Values.hubTokenSecretName"
    ),
    f"{REDIS}/template/spec/containers/redis/image": Scalar("$.Values.redis.image"),
    f"{REDIS}/template/spec/containers/redis/resources": Block("$.Values.redis.resources"),
    f"{REDIS}/template/spec/volumes/password/secret/secretName": Scalar("$.Values.redis.passwordSecret.name"),
    f"{REDIS}/volumeClaimTemplates/0/spec/resources/requests/storage": Scalar("$.Values.redis.size"),
    "NetworkPolicy/hycluster-ray/spec/egress/1": lambda own: When(
        "$.Values.redis.enabled",
        own,
        {
            "to": [Each("$cidr := $.Values.redis.cidrs", {"ipBlock": {"cidr": Scalar("$cidr")}})],
            "ports": [{"port": Scalar('$.Values.redis.address | splitList ":" | last | int')}],
        },
    ),
    "NetworkPolicy/hycluster-head/spec/egress/0/to": [
        Each("$cidr := $.Values.networkPolicies.apiServerCidrs", {"ipBlock": {"cidr": Scalar("$cidr")}})
    ],
    "NetworkPolicy/hycluster-ingress/spec/ingress/0/from/1": Each(
        "$client := $.Values.networkPolicies.clients",
        {
            "namespaceSelector": {"matchLabels": Block("$client.namespaceLabels")},
            "podSelector": When("$client.podLabels", {"matchLabels": Block("$client.podLabels")}),
        },
    ),
    "PodDisruptionBudget/hycluster-ingress/spec/minAvailable": Scalar(
        'include "hycluster.ingressReplicas" $ | int | add -1 | max 1'
    ),
    "PodDisruptionBudget/hycluster-engines/metadata/name": Scalar('printf "hycluster-%s" $group.name'),
    "PodDisruptionBudget/hycluster-engines/spec/minAvailable": Scalar("$group.minAvailable"),
    f"{CLAIM}/spec/resources/requests/storage": Scalar("$.Values.weights.size"),
    "ConfigMap/hycluster-nccl/data": Block("$.Values.rdma.environment"),
    "HTTPRoute/hycluster/spec/parentRefs/0/name": Scalar("$.Values.gateway.name"),
    "HTTPRoute/hycluster/spec/parentRefs/0/namespace": Scalar("$.Values.gateway.namespace"),
    "HTTPRoute/hycluster/spec/hostnames": Block("$.Values.hosts.http"),
    "HTTPRoute/hycluster/spec/rules/0/filters/0/extensionRef": Block("$.Values.gateway.authFilter"),
    "HTTPRoute/hycluster/spec/rules/0/filters": unless_authenticated,
    "GRPCRoute/hycluster/spec/parentRefs/0/name": Scalar("$.Values.gateway.name"),
    "GRPCRoute/hycluster/spec/parentRefs/0/namespace": Scalar("$.Values.gateway.namespace"),
    "GRPCRoute/hycluster/spec/hostnames": Block("$.Values.hosts.grpc"),
    "GRPCRoute/hycluster/spec/rules/0/filters/0/extensionRef": Block("$.Values.gateway.authFilter"),
    "GRPCRoute/hycluster/spec/rules/0/filters": unless_authenticated,
    f"NetworkPolicy/hycluster-gateway/{FROM}/{NAMESPACE}": Scalar("$.Values.gateway.namespace"),
    f"NetworkPolicy/hycluster-gateway/{FROM}/podSelector/matchLabels/gateway.networking.k8s.io~1gateway-name": Scalar(
        "$.Values.gateway.name"
    ),
    f"NetworkPolicy/hycluster-ingress-controller/{FROM}/{NAMESPACE}": Scalar("$.Values.ingress.namespace"),
    f"NetworkPolicy/hycluster-ingress-controller/{FROM}/podSelector/matchLabels": labels("ingress"),
    f"NetworkPolicy/hycluster-metrics/{FROM}/{NAMESPACE}": Scalar("$.Values.metrics.namespace"),
    f"NetworkPolicy/hycluster-metrics/{FROM}/podSelector/matchLabels": labels("metrics"),
    f"NetworkPolicy/hycluster-ray-metrics/{FROM}/{NAMESPACE}": Scalar("$.Values.metrics.namespace"),
    f"NetworkPolicy/hycluster-ray-metrics/{FROM}/podSelector/matchLabels": labels("metrics"),
}
AUTHENTICATED = When(
    "$.Values.gateway.authenticatedBy", {"hycluster/authenticated-by": Scalar("$.Values.gateway.authenticatedBy")}
)
# Beside what is there.
ADDED: dict[str, Any] = {
    "RayService/hycluster/spec/rayClusterDeletionDelaySeconds": Scalar('include "hycluster.deletionDelay" $ | int'),
    "RayService/hycluster/spec/serveConfigV2": Lines('include "hycluster.serveConfig" $'),
    f"{INGRESS}/template/spec/containers/ray-worker/envFrom": When(
        ANY_STORE, [{"secretRef": {"name": Scalar("$.Values.objectStore.secretName"), "optional": True}}]
    ),
    f"{ENGINES}/numOfHosts": When("gt (int $group.hosts) 1", Scalar("$group.hosts")),
    f"{ENGINES}/resources": IfAny("$group.rayResources"),
    f"{ENGINES}/template/metadata/labels/hycluster~1group": When("$group.several", Scalar("$group.name")),
    "PodDisruptionBudget/hycluster-engines/spec/selector/matchLabels/hycluster~1group": When(
        "$group.several", Scalar("$group.name")
    ),
    f"{REDIS}/template/spec/volumes/password/secret/items": When(
        'ne $.Values.redis.passwordSecret.key "password"',
        [{"key": Scalar("$.Values.redis.passwordSecret.key"), "path": "password"}],
    ),
    f"{REDIS}/volumeClaimTemplates/0/spec/storageClassName": When(
        "$.Values.redis.storageClassName", Scalar("$.Values.redis.storageClassName")
    ),
    f"{CLAIM}/spec/storageClassName": When(
        "$.Values.weights.storageClassName", Scalar("$.Values.weights.storageClassName")
    ),
    "HTTPRoute/hycluster/metadata/annotations": AUTHENTICATED,
    "GRPCRoute/hycluster/metadata/annotations": AUTHENTICATED,
    # A release that is uninstalled leaves what took hours to fetch.
    f"{CLAIM}/metadata/annotations": {"helm.sh/resource-policy": "keep"},
}
# Which pods run where: the values' name of each.
PODS = {
    HEAD: "$.Values.head",
    INGRESS: "$.Values.ingressPods",
    ENGINES: "$group",
    REDIS: "$.Values.redis",
}
# Monitors get these labels besides.
MONITORS = {"ServiceMonitor": "$.Values.metrics.labels", "PodMonitor": "$.Values.metrics.labels"}
