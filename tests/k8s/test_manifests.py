"""Every overlay and job, plain and with the components on top, is what clusters take; planted mistakes are found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.kustomize import COMPONENTS, JOBS, K8S, OVERLAYS, built, with_components
from tests.k8s.rules import broken
from tests.k8s.schema import schema_errors

# In overlays of the GPUs already, and nothing without them.
WITHIN = {"h20", "weights"}
ON_TOP = [component for component in COMPONENTS if component.name not in WITHIN]


def problems(resources: list[dict[str, Any]], suspects: list[dict[str, Any]] | None = None) -> list[str]:
    """What is wrong with manifests.

    Args:
        suspects: those that an API server may refuse; by default all. It takes some tenths of a second each.
    """
    suspects = resources if suspects is None else suspects
    refused = [f"{r['kind']} {r['metadata']['name']}: {e}" for r in suspects for e in schema_errors(r)]
    return refused or broken(resources)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each kind that there is: the largest overlay, both jobs, all components."""
    scratch = tmp_path_factory.mktemp("kustomize")
    large = with_components(K8S / "overlays" / "hunyuan-large-bf16", ON_TOP, scratch)
    return [*large, *(resource for job in JOBS for resource in built(job))]


@pytest.mark.parametrize("folder", [*OVERLAYS, *JOBS], ids=lambda folder: folder.name)
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
DOORS = "spec.rayClusterConfig.workerGroupSpecs.0"
ENGINES = "spec.rayClusterConfig.workerGroupSpecs.1"
DOOR = f"{DOORS}.template.spec.containers.0"
ENGINE = f"{ENGINES}.template.spec.containers.0"
JOB_HEAD = "spec.rayClusterSpec.headGroupSpec.template.spec"

PLANTED: list[tuple[str, str, Any, str]] = [
    # What the API server refuses.
    ("RayService", "spec.rayClusterConfig.autoscalerOptions.versoin", "v2", "versoin"),
    ("RayService", f"{ENGINES}.maxReplicas", "two", "maxReplicas"),
    ("RayService", "spec.rayClusterConfig.authOptions.mode", "none", "none"),
    ("RayService", f"{DOOR}.readinessProbe.httpGet.prot", 8000, "prot"),
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
    # What it takes, and what would not work.
    ("RayService", "metadata.name", "hycluster-of-a-name-that-is-far-too-long-for-ray", "47 characters"),
    ("RayService", "spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", "must be NewCluster"),
    ("RayService", "spec.excludeHeadPodFromServeSvc", GONE, "head has no door"),
    ("RayService", "spec.rayClusterConfig.rayVersion", "2.59.0", "rayVersion"),
    ("RayService", "spec.rayClusterConfig.authOptions", GONE, "must be token"),
    ("RayService", "spec.rayClusterConfig.autoscalerOptions.version", "v1", "must be v2"),
    ("RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions", GONE, "redisAddress"),
    ("RayService", "spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", "4", "num-cpus"),
    ("RayService", f"{ENGINES}.template.spec.restartPolicy", "Always", "restartPolicy"),
    ("RayService", f"{ENGINES}.maxReplicas", 0, "minReplicas to maxReplicas"),
    ("RayService", f"{ENGINES}.rayStartParams.num-gpus", "8", "rayStartParams too"),
    ("RayService", f"{ENGINES}.resources.accelerator_type:H20", GONE, "accelerator_type:H20"),
    ("RayService", f"{ENGINES}.numOfHosts", 1, "ask for 16"),
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
    ("RayService", f"{DOOR}.lifecycle.preStop.exec.command", ["sleep", "60"], "terminationGracePeriodSeconds"),
    ("RayService", f"{DOOR}.ports.0.containerPort", 8001, "ports of the doors' pods"),
    ("RayService", f"{DOORS}.resources.door", "0.5", "room for a door's successor"),
    ("RayService", f"{DOORS}.minReplicas", 1, "a pod each"),
    ("RayService", f"{HEAD}.securityContext.runAsNonRoot", False, "not root"),
    ("RayService", f"{HEAD}.securityContext.seccompProfile", GONE, "seccompProfile"),
    ("RayService", f"{DOORS}.template.spec.automountServiceAccountToken", True, "no token"),
    ("RayJob", "spec.shutdownAfterJobFinishes", False, "held for ever"),
    ("RayJob", "spec.backoffLimit", 0, "tries"),
    ("RayJob", "spec.entrypoint", "sleep 1", "batch run"),
    ("RayJob", f"{JOB_HEAD}.serviceAccountName", "default", "no token"),
    ("RayCronJob", "metadata.name", "hycluster-nightly-of-a-very-long-name", "36 characters"),
    ("Service", "spec.selector", {"hycluster/role": "door"}, "selects no pod"),
    ("Service", "spec.ports.0.targetPort", "http", "no selected pod has a port http"),
    ("StatefulSet", "spec.template.metadata.labels", {"a": "b"}, "selects no pod"),
    ("PodDisruptionBudget", "spec.minAvailable", "50%", "must be a number"),
    ("PodDisruptionBudget", "spec.minAvailable", 3, "3 of 2"),
    ("NetworkPolicy", "spec.podSelector.matchLabels", {"hycluster/role": "nobody"}, "selects no pod"),
    ("ServiceAccount", "automountServiceAccountToken", True, "must be false"),
    ("Namespace", "metadata.labels", {}, "restricted"),
    ("PersistentVolumeClaim", "spec.accessModes", ["ReadWriteOnce"], "several nodes"),
    ("ConfigMap", "data.REPO", "", "REPO"),
    ("HTTPRoute", "spec.rules.0.backendRefs.0.port", 9000, "hycluster at 8000"),
    ("GRPCRoute", "spec.rules.0.backendRefs.0.name", "other", "hycluster at 9000"),
    ("ServiceMonitor", "spec.endpoints.0.port", "metrics", "port http"),
]


def planted(manifests: list[dict[str, Any]], kind: str, path: str, value: Any) -> list[dict[str, Any]]:
    """A copy, the first resource of a kind to its front and with a value set."""
    changed = copy.deepcopy(manifests)
    changed.sort(key=lambda resource: resource["kind"] != kind)
    target: Any = changed[0]
    *parents, last = path.split(".")
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
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
    ("port: 8000", "port: 8080", "ports of the doors' pods"),
    ("data: 2", "data: 4", "ask for 32"),
    ("doors_per_node: 1", "doors_per_node: 2", "doors_per_node: 2: must be 1"),
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


def test_a_mistake_is_planted_in_each_kind(manifests: list[dict[str, Any]]) -> None:
    assert {kind for kind, *_ in PLANTED} == {resource["kind"] for resource in manifests}


def test_pods_for_all_replicas_that_a_load_may_ask_for() -> None:
    resources = built(K8S / "overlays" / "hunyuan-a13b")
    (service,) = (resource for resource in resources if resource["kind"] == "RayService")
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] = 3
    (said,) = problems(resources, [])
    assert said == "RayService hycluster: engines: 12 GPUs in maxReplicas' pods; the settings ask for up to 16"
