"""Rules of Ray clusters, of RayServices and of jobs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version

from hycluster.k8s.pods import All, Broken, Pod, Resource, cluster_of, job_of, pods_of
from hycluster.k8s.rules.objects import settings_in
from hycluster.replica.placement import reserved

NAME_LIMIT = {"RayService": 47, "RayJob": 47, "RayCronJob": 36, "RayCluster": 63}
HOSTNAME = "kubernetes.io/hostname"


@cache
def ray_version() -> str:
    return version("ray")


def _name(resource: Resource, _all: All) -> Iterator[Broken]:
    name, limit = resource["metadata"]["name"], NAME_LIMIT[resource["kind"]]
    if len(name) > limit:
        yield Broken(
            "metadata.name",
            f"{name!r} has {len(name)} characters",
            f"have {limit} characters or fewer",
            "KubeRay refuses it",
        )


def _cluster(resource: Resource, _all: All) -> Iterator[Broken]:
    path, cluster = cluster_of(resource)
    if not cluster:
        return
    if "headGroupSpec" not in cluster:
        yield Broken(f"{path}.headGroupSpec", "there is none", "be there", "a cluster without a head is none")
        return
    if cluster.get("rayVersion") != ray_version():
        yield Broken(
            f"{path}.rayVersion",
            str(cluster.get("rayVersion")),
            f"be {ray_version()}, the image's",
            "KubeRay writes Ray's command line for the version that is named",
        )
    mode = (cluster.get("authOptions") or {}).get("mode")
    if mode != "token":
        yield Broken(f"{path}.authOptions.mode", str(mode), "be token", "who reaches a port of Ray's runs code there")
    cpus = (cluster["headGroupSpec"].get("rayStartParams") or {}).get("num-cpus")
    if cpus != "0":
        yield Broken(
            f"{path}.headGroupSpec.rayStartParams.num-cpus", str(cpus), 'be "0"', "the head's loss would be a replica's"
        )


def _groups(resource: Resource, _all: All) -> Iterator[Broken]:
    path, cluster = cluster_of(resource)
    if "headGroupSpec" not in cluster:
        return
    groups = cluster.get("workerGroupSpecs") or []
    places = [("headGroupSpec", cluster["headGroupSpec"])]
    places += [(f"workerGroupSpecs[{index}]", group) for index, group in enumerate(groups)]
    for place, group in places:
        policy = group["template"]["spec"].get("restartPolicy")
        if policy != "Never":
            yield Broken(
                f"{path}.{place}.template.spec.restartPolicy",
                str(policy),
                "be Never",
                "Ray's autoscaler v2 replaces pods itself",
            )
        told = (group.get("rayStartParams") or {}).keys() & {"num-cpus", "num-gpus", "resources"}
        if group.get("resources") and told:
            yield Broken(
                f"{path}.{place}.rayStartParams",
                f"{', '.join(sorted(told))} beside resources",
                "leave them to resources",
                "KubeRay refuses resources that are in rayStartParams too",
            )
    for place, group in places[1:]:
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 1 << 31)
        if not least <= group.get("replicas", least) <= most:
            yield Broken(
                f"{path}.{place}.replicas",
                str(group.get("replicas")),
                f"be from minReplicas to maxReplicas ({least} to {most})",
                "the autoscaler and KubeRay would contradict each other",
            )


def _service(resource: Resource, _all: All) -> Iterator[Broken]:
    spec = resource["spec"]
    kind = (spec.get("upgradeStrategy") or {}).get("type")
    if kind != "NewCluster":
        yield Broken("spec.upgradeStrategy.type", str(kind), "be NewCluster", "the incremental one loses gRPC callers")
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield Broken(
            "spec.excludeHeadPodFromServeSvc",
            str(spec.get("excludeHeadPodFromServeSvc")),
            "be true",
            "the head has no ingress process",
        )
    path, cluster = cluster_of(resource)
    scaler = (cluster.get("autoscalerOptions") or {}).get("version")
    if cluster.get("enableInTreeAutoscaling") is not True or scaler != "v2":
        yield Broken(
            f"{path}.autoscalerOptions.version",
            str(scaler),
            "be v2, and enableInTreeAutoscaling true",
            "v1 is on its way out",
        )


def _redis(resource: Resource, every: All) -> Iterator[Broken]:
    path, cluster = cluster_of(resource)
    field = f"{path}.gcsFaultToleranceOptions.redisAddress"
    address = str((cluster.get("gcsFaultToleranceOptions") or {}).get("redisAddress") or "")
    if not address:
        yield Broken(field, "there is none", "be set", "the head's loss would be everybody's")
        return
    env = {
        e["name"]: e.get("value", "")
        for e in cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", ())
    }
    for name, value in env.items():
        address = address.replace(f"$({name})", value)
    here = [
        service["metadata"]["name"]
        for service in every.of_kind("Service")
        if (service["spec"].get("selector") or {}).get("hycluster/role") == "redis"
    ]
    host = address.split("://")[-1].rpartition(":")[0]
    if here and host.split(".")[0] not in here:
        yield Broken(
            field,
            f"{address}, of which there is no Service here",
            f"name the Service {' or '.join(here)}, or the Redis here must go",
            "the head does not start; a namePrefix must reach here too",
        )


def _cluster_pods(resource: Resource, _all: All) -> list[Pod]:
    return list(pods_of(resource))


def _ingresses_are_apart(resource: Resource, every: All) -> Iterator[Broken]:
    """Ingress pods on different nodes: a wish is not enough, where there are nodes."""
    for pod in _cluster_pods(resource, every):
        if pod.role != "ingress":
            continue
        spread = [
            each
            for each in pod.spec.get("topologySpreadConstraints") or ()
            if each["topologyKey"] == HOSTNAME
            and each["whenUnsatisfiable"] == "DoNotSchedule"
            and (each.get("labelSelector") or {}).get("matchLabels", {}).items() <= pod.labels.items()
        ]
        affinity = (pod.spec.get("affinity") or {}).get("podAntiAffinity") or {}
        required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or ()
        if not spread and not any(term["topologyKey"] == HOSTNAME for term in required):
            yield Broken(
                f"{pod.path}.spec.topologySpreadConstraints",
                "ingress pods may share a node",
                f"demand (DoNotSchedule) that they spread over {HOSTNAME}",
                "one node's loss would leave no ingress process",
            )


def _one_service(resource: Resource, every: All) -> Iterator[Broken]:
    others = [
        r["metadata"]["name"]
        for r in every.of_kind("RayService")
        if r is not resource and _namespace(r) == _namespace(resource)
    ]
    if others:
        yield Broken(
            "metadata.namespace",
            f"{', '.join(others)} too",
            "be one installation's alone",
            "Services and policies select pods by labels that all installations share",
        )


def _namespace(resource: Resource) -> str:
    return str(resource["metadata"].get("namespace", ""))


def _job(resource: Resource, _all: All) -> Iterator[Broken]:
    path, spec = job_of(resource)
    if not spec.get("shutdownAfterJobFinishes"):
        yield Broken(
            f"{path}.shutdownAfterJobFinishes",
            str(spec.get("shutdownAfterJobFinishes")),
            "be true",
            "its nodes would be held for ever",
        )
    if spec.get("submissionMode") != "K8sJobMode":
        yield Broken(
            f"{path}.submissionMode", str(spec.get("submissionMode")), "be K8sJobMode", "the others try once only"
        )
    if not spec.get("backoffLimit"):
        yield Broken(
            f"{path}.backoffLimit", str(spec.get("backoffLimit")), "allow tries", "a job goes on where it stopped"
        )
    if "hycluster batch run" not in spec.get("entrypoint", ""):
        yield Broken(
            f"{path}.entrypoint", repr(spec.get("entrypoint")), "be 'hycluster batch run'", "nothing else resumes"
        )


def _job_has_room(resource: Resource, every: All) -> Iterator[Broken]:
    """CPUs and GPUs for all replicas of the settings that the job's pods mount."""
    for pod in _cluster_pods(resource, every):
        mounted = {(volume.get("configMap") or {}).get("name") for volume in pod.spec.get("volumes") or ()}
        maps = [m for m in every.of_kind("ConfigMap") if m["metadata"]["name"] in mounted and pod.role == "job-engines"]
        for settings in filter(None, (settings_in(each) for each in maps)):
            for name, ray_name in (("cpu", "CPU"), ("nvidia.com/gpu", "GPU")):
                there = pod.limit(name) * pod.count
                wanted = sum(reserved(model).get(ray_name, 0) * model.replicas.count for model in settings.models)
                if wanted > there:
                    yield Broken(
                        f"{pod.path}.spec.containers[0].resources.limits.{name}",
                        f"{there:g} in {pod.count} pods",
                        f"be {wanted:g} or more, for the replicas of its settings.yaml",
                        "the job would wait for engines for ever",
                    )


RULES = (_name, _cluster, _groups)
SERVICE_RULES = (_service, _redis, _ingresses_are_apart, _one_service)
JOB_RULES = (_job, _job_has_room)
