"""What must hold of our manifests and no API server looks at: each rule yields what breaks it.

Most of it is what KubeRay finds out later, or never, and what a cluster shows at 3 a.m.: a pod that is killed before it
has drained, a Service that selects nobody, a volume that is mounted and not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from hycluster import app, config
from hycluster.errors import SettingsError
from hycluster.k8s.render import PORTS
from hycluster.placement import on_gpus, reserved

Resource = dict[str, Any]
NAME_LIMIT = {"RayService": 47, "RayJob": 47, "RayCronJob": 36}
GIB = 1 << 30
# What Serve gives a deployment beyond drain_timeout_s, see hycluster/app.py.
SERVE_MARGIN_S = 15
# Between the end of Ray's drain and the kill: Ray ends its processes.
STOP_MARGIN_S = 15
RAY_VERSION = re.search(r"ray\[[^]]*\]==([\d.]+)", (Path(__file__).parents[2] / "pyproject.toml").read_text())


def broken(resources: list[Resource]) -> list[str]:
    """What is wrong with all that a kustomization makes."""
    pods = [pod for resource in resources for pod in _pods(resource)]
    found = [problem for pod in pods for rule in POD_RULES for problem in rule(pod)]
    for resource in resources:
        name = f"{resource['kind']} {resource['metadata']['name']}"
        for rule in RULES.get(resource["kind"], ()):
            found += [f"{name}: {problem}" for problem in rule(resource, pods)]
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that some resource will make.

    Attributes:
        count: of them at the least; at a time, where it is a job's.
        group: the Ray worker group's spec, the head's, or {}.
    """

    where: str
    template: Resource
    count: int
    group: Resource
    role: str

    @property
    def spec(self) -> Resource:
        spec: Resource = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template.get("metadata", {}).get("labels", {}))

    @property
    def main(self) -> Resource:
        container: Resource = self.spec["containers"][0]
        return container

    @property
    def env(self) -> dict[str, str]:
        return {entry["name"]: entry.get("value", "") for entry in self.main.get("env", ())}


def _pods(resource: Resource) -> Iterator[Pod]:
    kind, name, spec = resource["kind"], resource["metadata"]["name"], resource.get("spec", {})
    if kind == "StatefulSet":
        yield Pod(name, spec["template"], spec["replicas"], {}, "redis")
    job = spec if kind == "RayJob" else spec.get("jobTemplate", {})
    if "submitterPodTemplate" in job:
        yield Pod(f"{name} submitter", job["submitterPodTemplate"], 1, {}, "submitter")
    cluster = _cluster(resource)
    if cluster:
        yield Pod(f"{name} head", cluster["headGroupSpec"]["template"], 1, cluster["headGroupSpec"], "head")
        for group in cluster["workerGroupSpecs"]:
            count = group["minReplicas"] * group.get("numOfHosts", 1)
            yield Pod(f"{name} {group['groupName']}", group["template"], count, group, group["groupName"])


def _cluster(resource: Resource) -> Resource:
    spec = resource.get("spec", {})
    found: Resource = (
        spec.get("rayClusterConfig")
        or spec.get("rayClusterSpec")
        or spec.get("jobTemplate", {}).get("rayClusterSpec", {})
    )
    return found


def _pod_is_unprivileged(pod: Pod) -> Iterator[str]:
    security = pod.spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield f"{pod.where}: securityContext: must run as a user that is not root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"{pod.where}: securityContext.seccompProfile: must be RuntimeDefault"
    for container in [*pod.spec.get("initContainers", ()), *pod.spec["containers"]]:
        wanted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if container.get("securityContext") != wanted:
            yield f"{pod.where}: {container['name']}: securityContext: must be {wanted}"


def _pod_has_no_token(pod: Pod) -> Iterator[str]:
    # The autoscaler is a container of the RayService's head and asks the API server for pods.
    if pod.role == "head" and "serviceAccountName" not in pod.spec:
        return
    if pod.spec.get("automountServiceAccountToken") is not False or pod.spec.get("serviceAccountName") != "hycluster":
        yield f"{pod.where}: must have the service account hycluster and no token"


def _images_are_pinned(pod: Pod) -> Iterator[str]:
    for container in [*pod.spec.get("initContainers", ()), *pod.spec["containers"]]:
        image = container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{pod.where}: image {image}: must name a version"


def _resources_are_bounded(pod: Pod) -> Iterator[str]:
    for container in [*pod.spec.get("initContainers", ()), *pod.spec["containers"]]:
        asked, most = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
        if not {"cpu", "memory"} <= asked.keys():
            yield f"{pod.where}: {container['name']}: resources.requests: must name cpu and memory"
        elif most.get("memory") != asked["memory"]:
            yield f"{pod.where}: {container['name']}: resources.limits.memory: must be what is requested"


def _mounts_are_there(pod: Pod) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.spec.get("volumes", ())} | {"data"}
    for container in [*pod.spec.get("initContainers", ()), *pod.spec["containers"]]:
        mounts = container.get("volumeMounts", ())
        for missing in {mount["name"] for mount in mounts} - volumes:
            yield f"{pod.where}: {container['name']}: there is no volume {missing}"
        if pod.group and not {"/tmp", "/dev/shm", "/home/hycluster"} <= {m["mountPath"] for m in container_mounts(pod)}:
            yield f"{pod.where}: /tmp, /dev/shm and /home/hycluster must be volumes: the root filesystem is read-only"


def container_mounts(pod: Pod) -> list[Resource]:
    return list(pod.main.get("volumeMounts", ()))


def _is_probed(pod: Pod) -> Iterator[str]:
    if pod.role != "submitter":
        for probe in ("livenessProbe", "readinessProbe"):
            if probe not in pod.main:
                yield f"{pod.where}: {probe}: must be set"


def _ends_in_time(pod: Pod) -> Iterator[str]:
    if not pod.group:
        return
    drain_s = float(pod.env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
    command = pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    needs_s = float(command[1]) + drain_s + STOP_MARGIN_S
    if pod.spec.get("terminationGracePeriodSeconds", 30) < needs_s:
        yield f"{pod.where}: terminationGracePeriodSeconds: must be {needs_s:g} or more for preStop, drain and end"


def _object_store_fits(pod: Pod) -> Iterator[str]:
    """Ray takes a third of the memory for it by itself, and the disk where /dev/shm is smaller than that."""
    if not pod.group:
        return
    limits = {v["name"]: v["emptyDir"]["sizeLimit"] for v in pod.spec["volumes"] if v.get("emptyDir", {}).get("medium")}
    there_gib = float(limits["shared-mem"].removesuffix("Gi"))
    wanted = pod.group["rayStartParams"].get("object-store-memory")
    if wanted is None or int(wanted) > there_gib * GIB:
        yield f"{pod.where}: object-store-memory: must be set, and fit /dev/shm ({there_gib:g} GiB)"


POD_RULES = (
    _object_store_fits,
    _pod_is_unprivileged,
    _pod_has_no_token,
    _images_are_pinned,
    _resources_are_bounded,
    _mounts_are_there,
    _is_probed,
    _ends_in_time,
)


def _name_is_short(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    limit = NAME_LIMIT[resource["kind"]]
    if len(resource["metadata"]["name"]) > limit:
        yield f"metadata.name: must have {limit} characters or fewer"


def _ray_cluster(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    cluster = _cluster(resource)
    if RAY_VERSION is None or cluster["rayVersion"] != RAY_VERSION[1]:
        yield f"rayVersion: must be that of pyproject.toml, not {cluster['rayVersion']}"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode: must be token"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "headGroupSpec: num-cpus must be 0, so that no replica is on the head"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        if group["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{group.get('groupName', 'head')}: restartPolicy: must be Never, as autoscaler v2 wants it"
        if group.get("resources") and group["rayStartParams"].keys() & {"num-cpus", "num-gpus", "resources"}:
            yield f"{group.get('groupName', 'head')}: resources are in rayStartParams too"
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas: must be from minReplicas to maxReplicas"


def _service_cluster(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    spec, cluster = resource["spec"], resource["spec"]["rayClusterConfig"]
    if spec.get("upgradeStrategy", {}).get("type") != "NewCluster":
        yield "upgradeStrategy.type: must be NewCluster; the incremental one does not move gRPC callers"
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc: must be true; the head has no door"
    if not cluster.get("enableInTreeAutoscaling") or cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "autoscalerOptions.version: must be v2"
    if "redisAddress" not in cluster.get("gcsFaultToleranceOptions", {}):
        yield "gcsFaultToleranceOptions.redisAddress: must be set, or the head's loss is everybody's"
    groups = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if groups != ["doors", "engines"]:
        yield f"workerGroupSpecs: must be doors, engines; the overlays' patches count on it, not {groups}"


def _serve_settings(resource: Resource, _all: list[Pod]) -> Iterator[str]:
    serve = yaml.safe_load(resource["spec"]["serveConfigV2"])
    for dropped in _dropped(serve, ServeDeploySchema.model_validate(serve).model_dump(mode="json"), ""):
        yield f"serveConfigV2: {dropped}: Serve does not know it"
    if serve.get("proxy_location") != "Disabled":
        yield "serveConfigV2: proxy_location: must be Disabled; Serve's proxies would listen on the doors' ports"
    (application,) = serve["applications"]
    if (application["name"], application["import_path"]) != (app.APP_NAME, f"{app.__name__}:{app.build.__name__}"):
        yield "serveConfigV2: must start hycluster.app:build by the name hycluster"
    try:
        settings = config.validate(config.Settings, application["args"], "args")
    except SettingsError as error:
        yield f"serveConfigV2: {error.message}"
        return
    pods = {pod.role: pod for pod in _pods(resource)}
    yield from _doors_have_room(settings, pods["doors"])
    yield from _engines_have_room(settings, pods["engines"])
    for role in ("doors", "engines"):
        if float(pods[role].env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < settings.drain_timeout_s + SERVE_MARGIN_S:
            yield f"{role}: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S: must be above drain_timeout_s + {SERVE_MARGIN_S}"


def _doors_have_room(settings: config.Settings, pod: Pod) -> Iterator[str]:
    wanted, there = settings.door_resources.get("door", 0), float(pod.group["resources"]["door"])
    if not 0 < 2 * wanted <= there:
        yield f"door_resources: {wanted} of {there:g} a pod: must leave room for a door's successor"
    if settings.doors < 2 or settings.doors > pod.count:
        yield f"doors: {settings.doors} in {pod.count} pods: must be two or more, a pod each"
    if settings.doors_per_node != 1:
        yield f"doors_per_node: {settings.doors_per_node}: must be 1; the loss or the drain of one pod would take more"
    ports = {p["name"]: p["containerPort"] for p in pod.main["ports"]}
    listening = (settings.http.port, settings.grpc.port)
    if listening != (ports["door-http"], ports["door-grpc"]) or {settings.http.host, settings.grpc.host} != {"0.0.0.0"}:
        yield f"http, grpc: must listen on all addresses at {PORTS}, the ports of the doors' pods"


def _engines_have_room(settings: config.Settings, pod: Pod) -> Iterator[str]:
    limits = pod.main["resources"]["limits"]
    for resource, name in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
        each = float(limits.get(name, 0)) * pod.group.get("numOfHosts", 1)
        least, most = (each * pod.group[bound] for bound in ("minReplicas", "maxReplicas"))
        wanted = sum(reserved(m).get(resource, 0) * m.replicas.min for m in settings.models)
        if wanted > least or (resource == "GPU" and wanted != least):
            yield f"engines: {least:g} {resource}s in minReplicas' pods; the settings ask for {wanted:g}"
        wanted = sum(reserved(m).get(resource, 0) * m.replicas.most for m in settings.models)
        if wanted > most:
            yield f"engines: {most:g} {resource}s in maxReplicas' pods; the settings ask for up to {wanted:g}"
    for model in settings.models:
        if on_gpus(model) and f"accelerator_type:{model.hardware.accelerator}" not in pod.group.get("resources", {}):
            yield f"engines: resources: the autoscaler must know of accelerator_type:{model.hardware.accelerator}"


def _dropped(given: Any, kept: Any, path: str) -> Iterator[str]:
    """Keys that a schema has lost."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from _dropped(value, kept[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from _dropped(value, kept[index], f"{path}[{index}]")


def _selects(selector: Resource, pods: list[Pod]) -> list[Pod]:
    wanted = selector.get("matchLabels", selector)
    return [pod for pod in pods if wanted.items() <= pod.labels.items()]


def _selects_somebody(resource: Resource, pods: list[Pod]) -> Iterator[str]:
    spec = resource["spec"]
    selector = spec.get("podSelector") or spec["selector"]
    if not _selects(selector, pods):
        yield f"selects no pod: {selector}"


def _ports_are_there(resource: Resource, pods: list[Pod]) -> Iterator[str]:
    names = {p["name"] for pod in _selects(resource["spec"]["selector"], pods) for p in pod.main.get("ports", ())}
    for port in resource["spec"]["ports"]:
        target = port.get("targetPort", port["name"])
        if target not in names:
            yield f"ports: no selected pod has a port {target}"


def _budget(resource: Resource, pods: list[Pod]) -> Iterator[str]:
    spec = resource["spec"]
    there = sum(pod.count for pod in _selects(spec["selector"], pods))
    if not isinstance(spec.get("minAvailable"), int) or "maxUnavailable" in spec:
        yield "must be a number of minAvailable: nothing with a size stands behind Ray's pods"
    elif not 0 < spec["minAvailable"] <= there:
        yield f"minAvailable: {spec['minAvailable']} of {there} pods"


def _job(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    spec = resource["spec"].get("jobTemplate", resource["spec"])
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes: must be true, or its nodes are held for ever"
    if spec.get("submissionMode") != "K8sJobMode" or not spec.get("backoffLimit"):
        yield "submissionMode, backoffLimit: must be K8sJobMode with tries: a job goes on where it stopped"
    if "hycluster batch run" not in spec.get("entrypoint", ""):
        yield "entrypoint: must be 'hycluster batch run'"


def _is_restricted(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    if resource["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "must enforce the restricted pod security standard"


def _grants_nothing(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    if resource.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken: must be false"


def _is_shared(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    if resource["spec"]["accessModes"] != ["ReadWriteMany"]:
        yield "accessModes: doors and engines are on several nodes"


def _goes_to_the_doors(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    port = PORTS["grpc" if resource["kind"] == "GRPCRoute" else "http"]
    backends = [backend for rule in resource["spec"]["rules"] for backend in rule["backendRefs"]]
    if backends != [{"name": "hycluster", "port": port}]:
        yield f"backendRefs: must be the Service hycluster at {port}"


def _settings_are_valid(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    if "settings.yaml" in resource["data"]:
        try:
            config.validate(config.Settings, yaml.safe_load(resource["data"]["settings.yaml"]), "settings.yaml")
        except SettingsError as error:
            yield error.message
    elif missing := [key for key in ("INPUT", "OUTPUT", "JOB", "REPO", "REVISION") if resource["data"].get(key) == ""]:
        yield f"{missing}: must have a value"


def _reads_the_doors(resource: Resource, _pods: list[Pod]) -> Iterator[str]:
    if [endpoint["port"] for endpoint in resource["spec"]["endpoints"]] != ["http"]:
        yield "endpoints: must be the Service's port http"


RULES = {
    "RayService": (_name_is_short, _ray_cluster, _service_cluster, _serve_settings),
    "RayJob": (_name_is_short, _ray_cluster, _job),
    "RayCronJob": (_name_is_short, _ray_cluster, _job),
    "Service": (_selects_somebody, _ports_are_there),
    "StatefulSet": (_selects_somebody,),
    "NetworkPolicy": (_selects_somebody,),
    "PodDisruptionBudget": (_selects_somebody, _budget),
    "Namespace": (_is_restricted,),
    "ServiceAccount": (_grants_nothing,),
    "PersistentVolumeClaim": (_is_shared,),
    "HTTPRoute": (_goes_to_the_doors,),
    "GRPCRoute": (_goes_to_the_doors,),
    "ConfigMap": (_settings_are_valid,),
    "ServiceMonitor": (_reads_the_doors,),
}
