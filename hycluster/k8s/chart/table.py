"""Where the chart's values go in the manifests: the one list of what of ``k8s/base`` and ``k8s/components`` varies.

All that is not named here is as it is in those files. A path that leads nowhere any more is an error, and so is a
component that nobody has decided on.
"""

from __future__ import annotations

from typing import Any

from hycluster.k8s.chart.nodes import Block, Lines, Scalar, When

# Each component of k8s/components by its condition; None: it is for jobs, or its patches are values here.
COMPONENTS: dict[str, str | None] = {
    "gang-scheduling": "$.Values.gangScheduling",
    "gateway-routes": "$.Values.gateway.enabled",
    "h20": None,
    "kueue": None,
    "service-monitor": "$.Values.metrics.enabled",
    "weights": "$.Values.weights.enabled",
}
RAY = "RayService/hycluster/spec/rayClusterConfig"
HEAD = f"{RAY}/headGroupSpec"
DOORS = f"{RAY}/workerGroupSpecs/doors"
ENGINES = f"{RAY}/workerGroupSpecs/engines"
# The group that there is one of for each of .Values.engines.
GROUP, GROUP_NAME = ENGINES, Scalar("$group.name")
EACH = '$group := include "hycluster.groups" $ | fromYamlArray'
FROM_NAMESPACE = "spec/ingress/0/from/0/namespaceSelector/matchLabels/kubernetes.io~1metadata.name"
DRAIN = "env/RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S/value"

# Beyond drain_timeout_s.
MARGINS = {"drainMarginSeconds": 60, "graceMarginSeconds": 30, "deletionMarginSeconds": 0}
# Manifests that are there on a condition; those of components have their component's, if they are not here.
RESOURCES = {
    "Namespace/hycluster": "$.Values.namespace.create",
    "Service/hycluster-redis": "$.Values.redis.enabled",
    "StatefulSet/hycluster-redis": "$.Values.redis.enabled",
    "NetworkPolicy/hycluster-redis": "$.Values.redis.enabled",
    "NetworkPolicy/hycluster-gateway": "or $.Values.gateway.enabled $.Values.ingress.enabled",
    "PodDisruptionBudget/hycluster-engines": "gt (int $.Values.disruptionBudgets.engines) 0",
    "ConfigMap/hycluster-weights": "$.Values.weights.enabled",
    "Ingress/hycluster": "$.Values.ingress.enabled",
    "Ingress/hycluster-grpc": "$.Values.ingress.enabled",
}
# What overlays bring, each its own.
EXTRA: dict[str, list[dict[str, Any]]] = {
    "weights.yaml": [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "hycluster-weights"},
            "data": {
                "REPO": Scalar("$.Values.weights.repo"),
                "REVISION": Scalar("$.Values.weights.revision"),
                "FOLDER": Scalar("$.Values.weights.folder"),
            },
        }
    ],
}

# In place of what is there; a function is given what is there.
REPLACED: dict[str, Any] = {
    "RayService/hycluster/spec/rayClusterDeletionDelaySeconds": Scalar('include "hycluster.deletionDelay" $ | int'),
    f"{RAY}/authOptions/secretName": Scalar("$.Values.tokenSecretName"),
    f"{RAY}/gcsFaultToleranceOptions/redisAddress": Scalar('include "hycluster.redisAddress" $'),
    f"{RAY}/gcsFaultToleranceOptions/redisPassword/valueFrom/secretKeyRef/name": Scalar(
        "$.Values.redis.passwordSecret.name"
    ),
    f"{RAY}/gcsFaultToleranceOptions/redisPassword/valueFrom/secretKeyRef/key": Scalar(
        "$.Values.redis.passwordSecret.key"
    ),
    f"{RAY}/autoscalerOptions/idleTimeoutSeconds": Scalar("$.Values.autoscaler.idleTimeoutSeconds"),
    f"{RAY}/autoscalerOptions/resources": Block("$.Values.autoscaler.resources"),
    f"{HEAD}/template/spec/containers/ray-head/resources": Block("$.Values.head.resources"),
    f"{DOORS}/replicas": Scalar('include "hycluster.doors" $ | int'),
    f"{DOORS}/minReplicas": Scalar('include "hycluster.doors" $ | int'),
    f"{DOORS}/maxReplicas": Scalar('include "hycluster.doors" $ | int | add1'),
    f"{DOORS}/template/spec/terminationGracePeriodSeconds": Scalar('include "hycluster.grace" $ | int'),
    f"{DOORS}/template/spec/containers/ray-worker/{DRAIN}": Scalar('include "hycluster.drain" $'),
    f"{DOORS}/template/spec/containers/ray-worker/resources": Block("$.Values.doors.resources"),
    f"{ENGINES}/template/spec/terminationGracePeriodSeconds": Scalar('include "hycluster.grace" $ | int'),
    f"{ENGINES}/template/spec/containers/ray-worker/{DRAIN}": Scalar('include "hycluster.drain" $'),
    f"{ENGINES}/template/spec/containers/ray-worker/resources": Block("$group.resources"),
    f"{ENGINES}/template/spec/initContainers/fetch-weights/env/HF_TOKEN/valueFrom/secretKeyRef/name": Scalar(
        "$.Values.hubTokenSecretName"
    ),
    f"{ENGINES}/template/spec/volumes/shared-mem/emptyDir/sizeLimit": Scalar("$group.sharedMemory"),
    f"{ENGINES}/replicas": Scalar("$group.minReplicas"),
    f"{ENGINES}/minReplicas": Scalar("$group.minReplicas"),
    f"{ENGINES}/maxReplicas": Scalar("$group.maxReplicas"),
    "StatefulSet/hycluster-redis/spec/template/spec/containers/redis/env/REDIS_PASSWORD/valueFrom/secretKeyRef": Block(
        "$.Values.redis.passwordSecret"
    ),
    "StatefulSet/hycluster-redis/spec/volumeClaimTemplates/0/spec/resources/requests/storage": Scalar(
        "$.Values.redis.size"
    ),
    "NetworkPolicy/hycluster-doors/spec/ingress/0/from/1/namespaceSelector/matchLabels": Block(
        "$.Values.networkPolicies.clientNamespaces"
    ),
    "NetworkPolicy/hycluster-ray/spec/egress/1": lambda own: When(
        "$.Values.redis.enabled",
        own,
        {"ports": [{"port": Scalar('$.Values.redis.address | splitList ":" | last | int')}]},
    ),
    "PodDisruptionBudget/hycluster-doors/spec/minAvailable": Scalar("$.Values.disruptionBudgets.doors"),
    "PodDisruptionBudget/hycluster-engines/spec/minAvailable": Scalar("$.Values.disruptionBudgets.engines"),
    "PersistentVolumeClaim/hycluster-weights/spec/resources/requests/storage": Scalar("$.Values.weights.size"),
    "HTTPRoute/hycluster/spec/parentRefs/0/name": Scalar("$.Values.gateway.name"),
    "HTTPRoute/hycluster/spec/parentRefs/0/namespace": Scalar("$.Values.gateway.namespace"),
    "HTTPRoute/hycluster/spec/hostnames": Block("$.Values.hosts.http"),
    "GRPCRoute/hycluster/spec/parentRefs/0/name": Scalar("$.Values.gateway.name"),
    "GRPCRoute/hycluster/spec/parentRefs/0/namespace": Scalar("$.Values.gateway.namespace"),
    "GRPCRoute/hycluster/spec/hostnames": Block("$.Values.hosts.grpc"),
    f"NetworkPolicy/hycluster-gateway/{FROM_NAMESPACE}": (
        Scalar("ternary $.Values.gateway.namespace $.Values.ingress.namespace $.Values.gateway.enabled")
    ),
    f"NetworkPolicy/hycluster-metrics/{FROM_NAMESPACE}": (Scalar("$.Values.metrics.namespace")),
}
OBJECT_STORE = When(
    "$.Values.objectStore.secretName", [{"secretRef": {"name": Scalar("$.Values.objectStore.secretName")}}]
)
# Beside what is there; a dash adds to a list.
ADDED: dict[str, Any] = {
    "RayService/hycluster/spec/serveConfigV2": Lines('include "hycluster.serveConfig" $'),
    f"{ENGINES}/numOfHosts": When("gt (int $group.hosts) 1", Scalar("$group.hosts")),
    f"{ENGINES}/resources": When(
        "$group.accelerator",
        {
            "CPU": Scalar("toString $group.resources.requests.cpu"),
            "GPU": Scalar('toString (index $group.resources.limits "nvidia.com/gpu")'),
            Scalar('printf "accelerator_type:%s" $group.accelerator'): "1",
        },
    ),
    "StatefulSet/hycluster-redis/spec/volumeClaimTemplates/0/spec/storageClassName": When(
        "$.Values.redis.storageClassName", Scalar("$.Values.redis.storageClassName")
    ),
    "PersistentVolumeClaim/hycluster-weights/spec/storageClassName": When(
        "$.Values.weights.storageClassName", Scalar("$.Values.weights.storageClassName")
    ),
    f"{DOORS}/template/spec/containers/ray-worker/envFrom": OBJECT_STORE,
    f"{ENGINES}/template/spec/containers/ray-worker/envFrom": OBJECT_STORE,
    # A release that is uninstalled leaves what took hours to fetch.
    "PersistentVolumeClaim/hycluster-weights/metadata/annotations": {"helm.sh/resource-policy": "keep"},
    "ServiceMonitor/hycluster-doors/metadata/labels": {},
}
# Of every group's pods: its values' name.
PODS = {HEAD: "$.Values.head", DOORS: "$.Values.doors", ENGINES: "$group"}
