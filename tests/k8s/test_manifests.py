"""Every overlay and job, plain and with the components on top, is what clusters take; planted mistakes are found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from hycluster.k8s.check import broken, refused
from tests.k8s.kustomize import COMPONENTS, JOBS, K8S, OVERLAYS, built, with_components

# In overlays of the GPUs already, and nothing without them.
WITHIN = {"gpu", "weights", "name-references"}
CLUSTER = [K8S / "cluster", K8S / "cluster-ipc-lock"]
ON_TOP = [component for component in COMPONENTS if component.name not in WITHIN]


def problems(resources: list[dict[str, Any]], suspects: list[dict[str, Any]] | None = None) -> list[str]:
    """What is wrong with manifests.

    Args:
        suspects: those that an API server may refuse; by default all. It takes some tenths of a second each.
    """
    found = refused(resources if suspects is None else suspects) or broken(resources)
    return [str(fault) for fault in found]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each kind that there is: the largest overlay, both jobs, all components."""
    scratch = tmp_path_factory.mktemp("kustomize")
    large = with_components(K8S / "overlays" / "hunyuan-large-bf16", ON_TOP, scratch)
    cluster = built(K8S / "cluster-ipc-lock")
    # All in one is what a chart makes, never a kustomization.
    (namespace,) = (resource for resource in cluster if resource["kind"] == "Namespace")
    namespace["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "Helm"
    return [*large, *cluster, *(resource for job in JOBS for resource in built(job))]


@pytest.mark.parametrize("folder", [*OVERLAYS, *JOBS, *CLUSTER], ids=lambda folder: folder.name)
def test_it_is_what_clusters_take(folder: Path) -> None:
    assert problems(built(folder)) == []


def test_components_go_on_top_of_overlays(manifests: list[dict[str, Any]]) -> None:
    assert problems(manifests) == []
    assert {r["metadata"].get("namespace", "hycluster") for r in manifests} == {"hycluster"}


def test_components_go_on_top_of_jobs(tmp_path: Path) -> None:
    queued = [component for component in ON_TOP if component.name in ("kueue", "gang-scheduling")]
    resources = with_components(K8S / "jobs" / "summarize", queued, tmp_path)
    assert problems(resources) == []
    (job,) = (r for r in resources if r["kind"] == "RayJob")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "hycluster"
    assert job["metadata"]["labels"]["ray.io/gang-scheduling-enabled"] == "true"


GONE = object()
HEAD = "spec.rayClusterConfig.headGroupSpec.template.spec"
INGRESS_GROUP = "spec.rayClusterConfig.workerGroupSpecs.0"
ENGINES = "spec.rayClusterConfig.workerGroupSpecs.1"
INGRESS_CONTAINER = f"{INGRESS_GROUP}.template.spec.containers.0"
ENGINE = f"{ENGINES}.template.spec.containers.0"
HEAD_ENV = f"{HEAD}.containers.0.env"
JOB_HEAD = "spec.rayClusterSpec.headGroupSpec.template.spec"

PLANTED: list[tuple[str, str, Any, str]] = [
    # What the API server refuses.
    ("RayService", "spec.rayClusterConfig.autoscalerOptions.versoin", "v2", "versoin"),
    ("RayService", f"{ENGINES}.maxReplicas", "two", "maxReplicas"),
    ("RayService", "spec.rayClusterConfig.authOptions.mode", "none", "none"),
    ("RayService", f"{INGRESS_CONTAINER}.readinessProbe.httpGet.prot", 8000, "prot"),
    ("RayJob", "spec.retries", 3, "retries"),
    ("RayCronJob", "spec.schedule", GONE, "schedule"),
    ("Service", "spec.ports.0.appProtokol", "http", "appProtokol"),
    ("StatefulSet", "spec.template.spec.containers.0.livenessProbe.tcp", {}, "tcp"),
    ("PodDisruptionBudget", "spec.minAvailble", 1, "minAvailble"),
    ("NetworkPolicy", "spec.ingres", [], "ingres"),
    ("ServiceAccount", "automountToken", False, "automountToken"),
    ("Namespace", "metadata.label", {}, "label"),
    ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany", "accessModes"),
    ("ConfigMap", "data.JOB", 1, "data"),
    ("HTTPRoute", "spec.rules.0.matches.0.path.value", "v1", "value must be an absolute path"),
    ("GRPCRoute", "spec.rules.0.backendRefs.0.port", 90000, "90000"),
    ("ServiceMonitor", "spec.endpoints.0.intervall", "15s", "intervall"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.intervall", "15s", "intervall"),
    ("PrometheusRule", "spec.groups.0.rules.0.exprr", "up", "exprr"),
    ("PriorityClass", "preemption", "Never", "preemption"),
    # What it takes, and what would not work.
    ("RayService", "metadata.name", "hycluster-of-a-name-that-is-far-too-long-for-ray", "47 characters"),
    ("RayService", "spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", "be NewCluster"),
    ("RayService", "spec.excludeHeadPodFromServeSvc", GONE, "head has no ingress process"),
    ("RayService", "spec.rayClusterConfig.rayVersion", "2.59.0", "rayVersion"),
    ("RayService", "spec.rayClusterConfig.authOptions", GONE, "be token"),
    ("RayService", "spec.rayClusterConfig.autoscalerOptions.version", "v1", "be v2"),
    ("RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions", GONE, "redisAddress"),
    ("RayService", "spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", "4", "num-cpus"),
    ("RayService", f"{ENGINES}.template.spec.restartPolicy", "Always", "restartPolicy"),
    ("RayService", f"{ENGINES}.maxReplicas", 0, "minReplicas to maxReplicas"),
    ("RayService", f"{ENGINES}.rayStartParams.num-gpus", "8", "rayStartParams too"),
    ("RayService", f"{ENGINES}.resources.accelerator_type:H20", GONE, "accelerator_type:H20"),
    ("RayService", f"{ENGINES}.numOfHosts", 1, "hold 16"),
    ("RayService", f"{ENGINES}.template.spec.terminationGracePeriodSeconds", 60, "terminationGracePeriodSeconds"),
    ("RayService", f"{ENGINE}.env.0.value", "30", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"),
    ("RayService", f"{ENGINES}.rayStartParams.object-store-memory", "99999999999", "fit /dev/shm (32 GiB)"),
    ("RayService", f"{ENGINE}.livenessProbe", GONE, "livenessProbe"),
    ("RayService", f"{ENGINE}.image", "hycluster:latest", "must name a version"),
    ("RayService", f"{ENGINE}.image", "registry.example.com:5000/hycluster", "must name a version"),
    ("RayService", f"{ENGINE}.securityContext.readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
    ("RayService", f"{ENGINE}.volumeMounts.0.name", "temp", "no volume temp"),
    ("RayService", f"{ENGINE}.volumeMounts.0.mountPath", "/scratch", "/tmp"),
    ("RayService", f"{ENGINE}.resources.limits.memory", "512Gi", "limits.memory"),
    (
        "RayService",
        f"{INGRESS_CONTAINER}.lifecycle.preStop.exec.command",
        ["sleep", "60"],
        "terminationGracePeriodSeconds",
    ),
    ("RayService", f"{INGRESS_CONTAINER}.ports.0.containerPort", 8001, "of the ingress pods"),
    ("RayService", f"{INGRESS_GROUP}.resources.ingress", "0.5", "room for an ingress process's successor"),
    ("RayService", f"{INGRESS_GROUP}.minReplicas", 1, "a pod each"),
    ("RayService", f"{HEAD}.securityContext.runAsNonRoot", False, "not root"),
    ("RayService", f"{HEAD}.securityContext.seccompProfile", GONE, "seccompProfile"),
    ("RayService", f"{INGRESS_GROUP}.template.spec.automountServiceAccountToken", True, "a token in a pod"),
    (
        "RayService",
        f"{INGRESS_GROUP}.template.spec.serviceAccountName",
        "other",
        "one of the ServiceAccounts here: hycluster",
    ),
    ("RayService", f"{HEAD_ENV}.HYCLUSTER_REDIS.value", "mine-hycluster-redis", "of which there is no Service here"),
    ("RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions.redisAddress", "redis:6379", "name the Service"),
    ("RayService", "spec.rayClusterDeletionDelaySeconds", 60, "be 315 or more"),
    (
        "RayService",
        f"{INGRESS_GROUP}.template.spec.topologySpreadConstraints.0.whenUnsatisfiable",
        "ScheduleAnyway",
        "may share",
    ),
    ("RayService", f"{INGRESS_GROUP}.template.spec.priorityClassName", GONE, "evicts the head and the ingress"),
    ("RayService", f"{ENGINES}.template.spec.priorityClassName", "hycluster-control", "below theirs"),
    ("RayService", f"{HEAD_ENV}.RAY_USAGE_STATS_ENABLED.value", "1", "RAY_USAGE_STATS_ENABLED"),
    (
        "RayService",
        f"{ENGINES}.template.metadata.labels",
        {"hycluster/role": "engines"},
        "no NetworkPolicy here is for",
    ),
    ("RayService", f"{ENGINES}.template.spec.imagePullSecrets", GONE, "pulled there with a secret"),
    ("RayService", f"{ENGINE}.securityContext.runAsUser", 1000, "to root alone"),
    ("RayService", f"{ENGINE}.securityContext.capabilities.add", ["IPC_LOCK", "SYS_ADMIN"], "add nothing but"),
    ("RayService", f"{ENGINE}.securityContext.capabilities.add", GONE, "only IPC_LOCK is a reason"),
    (
        "RayJob",
        "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.cpu",
        "500m",
        "be 1 or",
    ),
    ("RayJob", "spec.shutdownAfterJobFinishes", False, "held for ever"),
    ("RayJob", "spec.backoffLimit", 0, "tries"),
    ("RayJob", "spec.entrypoint", "sleep 1", "batch run"),
    ("RayJob", f"{JOB_HEAD}.serviceAccountName", "default", "without rights"),
    ("RayCronJob", "metadata.name", "hycluster-nightly-of-a-very-long-name", "36 characters"),
    ("Service", "spec.selector", {"hycluster/role": "entrance"}, "selects no pod"),
    ("Service", "spec.ports.0.targetPort", "http", "no selected pod has a port http"),
    ("StatefulSet", "spec.template.metadata.labels", {"a": "b"}, "selects no pod"),
    ("PodDisruptionBudget", "spec.minAvailable", "50%", "be a number"),
    ("PodDisruptionBudget", "spec.minAvailable", 3, "3 of 2"),
    ("PodDisruptionBudget", "spec.minAvailable", 0, "more than one at once"),
    ("NetworkPolicy", "spec.podSelector.matchLabels", {"hycluster/role": "nobody"}, "selects no pod"),
    (
        "NetworkPolicy/hycluster-head",
        "spec.ingress.0.from.0.podSelector.matchExpressions.0.values",
        ["kuberay"],
        "kuberay-operator",
    ),
    ("NetworkPolicy/hycluster-head", "spec.egress", [], "lets the autoscaler to the API server"),
    ("NetworkPolicy/hycluster-metrics", "spec.ingress.0.from.0.podSelector", GONE, "one port"),
    ("NetworkPolicy/hycluster-ray-metrics", "spec.ingress.0.ports", [{"port": 9090}], "which no NetworkPolicy opens"),
    ("NetworkPolicy/hycluster-weights", "metadata.annotations", {}, "say for what"),
    ("NetworkPolicy/hycluster-ray", "spec.egress.0.to", GONE, "would find the Internet open"),
    ("NetworkPolicy", "spec.ingress", [{}], "everybody"),
    ("NetworkPolicy", "spec.ingress", [{"from": [{"namespaceSelector": {}}]}], "name the pods"),
    (
        "NetworkPolicy/hycluster-ingress",
        "spec.ingress.0.from",
        [{"ipBlock": {"cidr": "0.0.0.0/0"}}],
        "0.0.0.0/0; must be narrower",
    ),
    ("NetworkPolicy/hycluster-ingress", "spec.ingress.0.from", [{"ipBlock": {"cidr": "::/0"}}], "must be narrower"),
    ("NetworkPolicy/hycluster-ingress", "spec.ingress.0.from", [{"ipBlock": {"cidr": "128.0.0.0/1"}}], "be narrower"),
    ("Service/hycluster", "spec.type", "LoadBalancer", "spec.type: LoadBalancer; must be ClusterIP"),
    ("Service/hycluster", "spec.type", "NodePort", "spec.type: NodePort; must be ClusterIP"),
    ("Service/hycluster", "spec.externalIPs", ["203.0.113.7"], "spec.externalIPs"),
    ("RayService", "spec.serveService.spec.type", "LoadBalancer", "spec.serveService.spec.type: LoadBalancer"),
    ("RayService", "spec.rayClusterConfig.headGroupSpec.serviceType", "NodePort", "be ClusterIP"),
    ("RayService", f"{INGRESS_GROUP}.template.spec.hostNetwork", True, "policies do not hold"),
    ("RayService", f"{INGRESS_CONTAINER}.ports.0.hostPort", 8000, "open on the node's address"),
    ("RayService", f"{ENGINE}.image", "hycluster:0.1.0-cpu", "0.1.0-cpu with 8 GPUs; must be the image for GPUs"),
    (
        "RayJob",
        "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.image",
        "hycluster:0.1.0-gpu",
        "0.1.0-gpu without a GPU; must be the image for CPUs",
    ),
    ("RayService", f"{INGRESS_GROUP}.template.spec.terminationGracePeriodSeconds", 900_000, "be 90000 or less"),
    ("RayService", f"{ENGINES}.template.spec.nodeSelector", {"a/b/c": "x"}, "'a/b/c'; must be a label's name"),
    ("RayService", f"{ENGINES}.template.spec.nodeSelector", {"a": "NVIDIA H20"}, "'NVIDIA H20'; must be 63 letters"),
    ("RayService", f"{INGRESS_CONTAINER}.ports.0.containerPort", 80000, "80000; must be from 1 to 65535"),
    ("Service", "spec.ports.0.port", 0, "0; must be from 1 to 65535"),
    ("Service", "metadata.labels", {"a": "b c"}, "'b c'; must be 63 letters"),
    ("NetworkPolicy", "spec.ingress.0.ports.0.port", 70000, "from 1 to 65535"),
    ("NetworkPolicy/hycluster-head", "spec.egress.0.to.0.ipBlock.cidr", "10.0.0/8", "'10.0.0/8'; must be a network"),
    ("NetworkPolicy/hycluster-head", "spec.egress.0.to.0.ipBlock.cidr", "10.0.0.0/33", "must be a network"),
    ("NetworkPolicy/hycluster-weights", "spec.egress.0.to.0.ipBlock.except", ["::/1"], "a network within 0.0.0.0/0"),
    ("PriorityClass", "globalDefault", True, "be false"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.port", "metriks", "be one of"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.port", "gcs-server", "which no NetworkPolicy opens"),
    ("HTTPRoute", "spec.rules.0.filters", GONE, "nobody is asked for credentials"),
    ("GRPCRoute", "spec.rules.0.filters", GONE, "nobody is asked for credentials"),
    ("ServiceAccount", "automountServiceAccountToken", True, "be false"),
    ("Namespace", "metadata.annotations.hycluster/pod-security", GONE, "say why not"),
    ("Namespace", "metadata.annotations.helm\\.sh/resource-policy", GONE, "a delete would hang for good"),
    ("PersistentVolumeClaim", "spec.accessModes", ["ReadWriteOnce"], "several nodes"),
    ("ConfigMap", "data.REPO", "", "REPO"),
    ("ConfigMap/hycluster-weights", "data.REPO", "https://hub.example.com/a/b", "must be a hub id"),
    ("HTTPRoute", "spec.rules.0.backendRefs.0.port", 9000, "hycluster at 8000"),
    ("GRPCRoute", "spec.rules.0.backendRefs.0.name", "other", "hycluster at 9000"),
    ("ServiceMonitor", "spec.endpoints.0.port", "metrics", "be a port of a Service that it selects: grpc, http"),
]


def _item(items: list[Any], step: str) -> Any:
    """By its place, or by its name."""
    return items[int(step)] if step.isdigit() else next(item for item in items if item["name"] == step)


def planted(manifests: list[dict[str, Any]], kind: str, path: str, value: Any) -> list[dict[str, Any]]:
    """A copy, the first resource of a kind (or KIND/NAME) to its front and with a value set."""
    changed = copy.deepcopy(manifests)
    kind, _, name = kind.partition("/")
    changed.sort(
        key=lambda resource: (
            (resource["kind"], name or resource["metadata"]["name"]) != (kind, resource["metadata"]["name"])
        )
    )
    target: Any = changed[0]
    *parents, last = (part.replace("\\", ".") for part in path.replace("\\.", "\\").split("."))
    for part in parents:
        target = _item(target, part) if isinstance(target, list) else target[part]
    if value is GONE:
        del target[last]
    else:
        target[last] = value
    return changed


@pytest.mark.parametrize(("kind", "path", "value", "said"), PLANTED)
def test_a_planted_mistake_is_found(
    manifests: list[dict[str, Any]], kind: str, path: str, value: Any, said: str
) -> None:
    changed = planted(manifests, kind, path, value)
    assert said in "\n".join(problems(changed, changed[:1]))


SERVE_MISTAKES = [
    ("proxy_location: Disabled", "proxy_location: EveryNode", "proxy_location"),
    ("  import_path: hycluster.app:build", "  import_pth: x\n  import_path: hycluster.app:build", "import_pth"),
    ("import_path: hycluster.app:build", "import_path: hycluster.app:application", "hycluster.app:build"),
    ("drain_timeout_s: 300", "drain_timeout_s: 330", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"),
    ("drain_timeout_s: 300", "drain_timeout: 300", "drain_timeout"),
    ("port: 8000", "port: 8080", "the port ingress-http of the ingress pods"),
    ("data: 2", "data: 4", "hold 32"),
    ("source: /models/", "source: /elsewhere/", "'/elsewhere/Hunyuan-A52B-Instruct'; must be below a volumeMount"),
    ("source: /models/", "source: /tmp/", "the engine would find no weights"),
    ("source: /models/", "source: org/", "HF_HUB_OFFLINE is set"),
    ("      replicas: 2\n", "      replicas: 2\n      replicas: 3\n", "the key 'replicas' is given twice"),
    ("replicas_per_node: 1", "replicas_per_node: 2", "ingress.replicas_per_node: 2; must be 1"),
]


@pytest.mark.parametrize(("right", "wrong", "said"), SERVE_MISTAKES)
def test_a_mistake_in_serves_settings_is_found(
    manifests: list[dict[str, Any]], right: str, wrong: str, said: str
) -> None:
    service = next(resource for resource in manifests if resource["kind"] == "RayService")
    text = service["spec"]["serveConfigV2"]
    assert right in text
    changed = planted(manifests, "RayService", "spec.serveConfigV2", text.replace(right, wrong))
    assert said in "\n".join(problems(changed, []))


def test_a_service_without_serves_settings_is_told_so(manifests: list[dict[str, Any]]) -> None:
    said = "\n".join(problems(planted(manifests, "RayService", "spec.serveConfigV2", GONE), []))
    assert "spec.serveConfigV2: there is none; must be Ray Serve's settings" in said
    said = "\n".join(problems(planted(manifests, "RayService", "spec.serveConfigV2", "applications: 5"), []))
    assert "spec.serveConfigV2.applications: Input should be a valid list" in said
    assert "http" not in said


def test_a_mistake_is_planted_in_each_kind(manifests: list[dict[str, Any]]) -> None:
    assert {kind.partition("/")[0] for kind, *_ in PLANTED} == {resource["kind"] for resource in manifests}


def test_pods_for_all_replicas_that_a_load_may_ask_for() -> None:
    resources = built(K8S / "overlays" / "hunyuan-a13b")
    (service,) = (resource for resource in resources if resource["kind"] == "RayService")
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] = 3
    (said,) = problems(resources, [])
    assert said == (
        "RayService/hycluster: spec.rayClusterConfig.workerGroupSpecs[1].maxReplicas: 12 GPUs in 3 x 1 pods; must be as"
        " many as hold 16, which the settings allow (the load would ask for replicas that never come)"
    )
