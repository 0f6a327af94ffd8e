"""The pods that manifests will make, each with the place in its manifest where it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Resource = dict[str, Any]
ROLE = "hycluster/role"
SUFFIXES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Broken(NamedTuple):
    """What is wrong with one field.

    Attributes:
        field: its path, from the resource or from the pod's template on.
        wrong: what is there.
        allowed: what must be there, to go on with "must".
        why: what would happen otherwise.
    """

    field: str
    wrong: str
    allowed: str
    why: str


@dataclass(frozen=True)
class Pod:
    """A pod that some resource will make.

    Attributes:
        owner: kind and name of the resource.
        path: where in it the template is.
        count: pods of it at the least; at a time, where it is a job's.
        role: its label ``hycluster/role``; a Ray head's is always ``head``.
        group: the Ray worker group's spec, the head's, or {}.
        autoscaled: a container of Ray's autoscaler will be put beside the first one.
    """

    owner: str
    path: str
    template: Resource
    count: int
    role: str
    group: Resource = field(default_factory=dict)
    autoscaled: bool = False

    @property
    def spec(self) -> Resource:
        spec: Resource = self.template.get("spec", {})
        return spec

    @property
    def labels(self) -> dict[str, str]:
        return labels_of(self.template)

    @property
    def main(self) -> Resource:
        container: Resource = self.spec["containers"][0]
        return container

    @property
    def containers(self) -> list[tuple[str, Resource]]:
        """All of them, the first steps too, each with its path."""
        found = []
        for key in ("initContainers", "containers"):
            found += [(f"spec.{key}[{index}]", each) for index, each in enumerate(self.spec.get(key) or ())]
        return found

    @property
    def env(self) -> dict[str, str]:
        """Of the main container: what is written there, "" where it comes from elsewhere."""
        return {entry["name"]: entry.get("value", "") for entry in self.main.get("env") or ()}

    @property
    def hosts(self) -> int:
        return int(self.group.get("numOfHosts", 1))

    def bound(self, name: str) -> int:
        """``minReplicas``, ``replicas`` or ``maxReplicas`` of a worker group."""
        return int(self.group.get(name, 1 if name != "maxReplicas" else (1 << 31) - 1))

    def limit(self, resource: str) -> float:
        """Of the main container, in bytes, CPUs or pieces; 0 if there is none."""
        return quantity((self.main.get("resources") or {}).get("limits", {}).get(resource, 0))


@dataclass(frozen=True)
class All:
    """All that is looked at together.

    Attributes:
        digests: images must be named by what they hold, not by a tag that can be moved.
    """

    resources: Sequence[Resource]
    pods: Sequence[Pod]
    digests: bool = False

    def of_kind(self, kind: str) -> list[Resource]:
        return [resource for resource in self.resources if resource.get("kind") == kind]


def labels_of(thing: Resource) -> dict[str, str]:
    return dict((thing.get("metadata") or {}).get("labels") or {})


def annotations_of(resource: Resource) -> dict[str, str]:
    return dict((resource.get("metadata") or {}).get("annotations") or {})


def name_of(resource: Resource) -> str:
    return f"{resource.get('kind')}/{(resource.get('metadata') or {}).get('name')}"


def quantity(text: Any) -> float:
    """A quantity as Kubernetes writes it, as a number."""
    text = str(text)
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    for suffix, factor in SUFFIXES.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def cluster_of(resource: Resource) -> tuple[str, Resource]:
    """The Ray cluster that a resource describes, and its path; ("", {}) if it describes none."""
    if not str(resource.get("apiVersion", "")).startswith("ray.io/"):
        return "", {}
    spec = resource.get("spec") or {}
    if resource.get("kind") == "RayCluster":
        return "spec", spec
    for path, owner in (("spec", spec), ("spec.jobTemplate", spec.get("jobTemplate") or {})):
        for key in ("rayClusterConfig", "rayClusterSpec"):
            if owner.get(key):
                return f"{path}.{key}", owner[key]
    return "", {}


def job_of(resource: Resource) -> tuple[str, Resource]:
    """The spec of a RayJob, or of the one that a RayCronJob makes, and its path."""
    spec = resource.get("spec") or {}
    return ("spec.jobTemplate", spec["jobTemplate"]) if "jobTemplate" in spec else ("spec", spec)


def pods_of(resource: Resource) -> Iterator[Pod]:
    owner, kind, spec = name_of(resource), resource.get("kind"), resource.get("spec") or {}
    if kind in ("StatefulSet", "Deployment", "DaemonSet", "Job"):
        template = spec["template"]
        yield Pod(owner, "spec.template", template, spec.get("replicas", 1), labels_of(template).get(ROLE, ""))
    elif kind == "CronJob":
        template = spec["jobTemplate"]["spec"]["template"]
        yield Pod(owner, "spec.jobTemplate.spec.template", template, 1, labels_of(template).get(ROLE, ""))
    elif kind == "Pod":
        yield Pod(owner, "", resource, 1, labels_of(resource).get(ROLE, ""))
    path, cluster = cluster_of(resource)
    if "headGroupSpec" not in cluster:
        return
    job_path, job = job_of(resource)
    if "submitterPodTemplate" in job:
        yield Pod(owner, f"{job_path}.submitterPodTemplate", job["submitterPodTemplate"], 1, "submitter")
    head = cluster["headGroupSpec"]
    autoscaled = bool(cluster.get("enableInTreeAutoscaling"))
    yield Pod(owner, f"{path}.headGroupSpec.template", head["template"], 1, "head", head, autoscaled)
    for index, group in enumerate(cluster.get("workerGroupSpecs") or ()):
        count = group.get("minReplicas", 1) * group.get("numOfHosts", 1)
        role = labels_of(group["template"]).get(ROLE, "")
        yield Pod(owner, f"{path}.workerGroupSpecs[{index}].template", group["template"], count, role, group)
