"""A submitted job as a manifest for KubeRay: a RayJob in a cluster that is there, or in one of its own.

In ``HTTPMode`` the operator gives Ray's job API the very command that ``batch submit`` would: there is no pod that
submits, and a head that comes back without its memory is given the job again, which goes on where it stopped. The
RayJob's name is the job's id in Ray too. Written for KubeRay 1.7 (``ray.io/v1``).
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hycluster import __version__
from hycluster.batch.job import Job
from hycluster.errors import SettingsError, Unavailable, shown
from hycluster.replica.placement import bundles, on_gpus, reserved, strategy
from hycluster.settings.as_yaml import as_yaml
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.submit.submission import Submission
from hycluster.submit.target import KubernetesTarget

Manifest = dict[str, Any]
# How long an ended job's cluster stays, so that its log can be read.
KEEP_ENDED_S = 600
# Ray, the object store, the processes that read and feed; beside what the engines take.
POD_GIB = 6
# What an engine on CPU, or each GPU's, is given where the settings do not say (hardware.memory_gib).
UNKNOWN_GIB = 8
HEAD = {"cpu": "2", "memory": "8Gi"}
HEAD_PORTS = {"dashboard": 8265, "gcs": 6379, "client": 10001}
# What Ray gives a job that is cancelled until it is killed; 3 s without this.
STOP_WAIT_S = 30


def ray_job(
    submission: Submission, job: Job, settings: Settings | None, target: KubernetesTarget
) -> tuple[Manifest, tuple[str, ...]]:
    """The RayJob of a submission, and notes on what was assumed for it.

    Args:
        settings: the deployment that was submitted along; None with ``engine: shared``.

    Raises:
        SettingsError: the target's template is none; names the option.
    """
    metadata: Manifest = {"name": submission.id}
    notes: tuple[str, ...] = ()
    if target.cluster is not None:
        # KubeRay neither retries in a cluster that is there nor takes it away.
        where: Manifest = {"clusterSelector": {"ray.io/cluster": target.cluster}, "backoffLimit": 0}
    else:
        if target.template is not None:
            cluster, theirs = template(target.template)
            metadata |= theirs
        else:
            if settings is None:
                raise SettingsError("engine: 'shared' needs a cluster that serves (--cluster)")
            cluster, notes = cluster_for(settings.model(job.model), job, target.image)
        where = {
            "rayClusterSpec": cluster,
            # A second cluster, should this one be lost; it goes on where the first one stopped.
            "backoffLimit": 1,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_ENDED_S,
        }
    if target.namespace is not None:
        metadata["namespace"] = target.namespace
    metadata["labels"] = {**metadata.get("labels", {}), "app.kubernetes.io/part-of": "hycluster"}
    spec: Manifest = {
        "submissionMode": "HTTPMode",
        "jobId": submission.id,
        "metadata": submission.metadata,
        "entrypoint": submission.command,
        **where,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}, notes


def default_image(model: Model) -> str:
    """The name that the Dockerfile tells to build under."""
    return f"hycluster:{__version__}-{'gpu' if on_gpus(model) else 'cpu'}"


def cluster_for(model: Model, job: Job, image: str | None = None) -> tuple[Manifest, tuple[str, ...]]:
    """A RayCluster's spec with room for the replicas of a model, and notes on what was assumed for it.

    A worker pod holds a whole replica, or as much of it as a node does (``hardware.gpus_per_node``).
    """
    image = image or default_image(model)
    total = reserved(model)
    gpus, pods = int(total.get("GPU", 0)), _pods_a_replica(model)
    memory_gib, notes = _memory_gib(model)
    limits = {
        "cpu": str(math.ceil(total["CPU"] / pods) + job.generate_processes),
        "memory": f"{math.ceil(memory_gib / pods) + POD_GIB}Gi",
    }
    if gpus:
        limits["nvidia.com/gpu"] = str(math.ceil(gpus / pods))
    if model.source.startswith(("/", "~", ".")):
        notes = (*notes, f"source: {shown(model.source)} must be in the image; --template takes a cluster with volumes")
    count = model.replicas.count * pods
    head = _pod("ray-head", image, HEAD)
    head["spec"]["containers"][0] |= {
        "ports": [{"name": name, "containerPort": port} for name, port in HEAD_PORTS.items()],
        "env": [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(STOP_WAIT_S)}],
    }
    workers = _pod("ray-worker", image, limits)
    # Ray gives its workers a nice value of 15; engines are what these pods are for.
    workers["spec"]["containers"][0]["env"] = [{"name": "RAY_worker_niceness", "value": "0"}]
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # The head has the driver of the job; engines and readers go to workers.
            "rayStartParams": {"num-cpus": "0"},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "engines",
                "replicas": count,
                "minReplicas": count,
                "maxReplicas": count,
                "rayStartParams": {},
                "template": workers,
            }
        ],
    }, notes


def template(path: str) -> tuple[Manifest, Manifest]:
    """What is taken from a manifest (``-`` is standard input), a RayJob's or a RayCluster's.

    Returns:
        The cluster's spec, and the namespace and the labels that the manifest has.

    Other kinds in the same stream are passed over.

    Raises:
        SettingsError: there is not exactly one such manifest in it.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        found = [one for one in yaml.safe_load_all(text) if isinstance(one, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(f"--template: {path!r} can't be read: {reason}") from None
    keys = {"RayJob": "rayClusterSpec", "RayCluster": None}
    specs = []
    for manifest in found:
        if manifest.get("kind") not in keys:
            continue
        key, spec = keys[manifest["kind"]], manifest.get("spec") or {}
        cluster = spec.get(key) if key else spec
        if cluster:
            metadata = manifest.get("metadata") or {}
            specs.append((cluster, {key: metadata[key] for key in ("namespace", "labels") if metadata.get(key)}))
    if len(specs) != 1:
        raise SettingsError(
            f"--template: {path!r} has {len(specs)} manifests with a cluster in them;"
            " must be one RayJob with rayClusterSpec, or one RayCluster"
        )
    return specs[0]


def apply(manifest: Manifest) -> None:
    """Hand a manifest to the cluster that kubectl points to.

    Raises:
        SettingsError: there is no kubectl.
        Unavailable: kubectl could not apply it; its own last line says why.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise SettingsError("--kubernetes: there is no kubectl on PATH; install it, or take --dry-run for the manifest")
    done = subprocess.run(
        [kubectl, "apply", "-f", "-"], input=as_yaml(manifest), text=True, capture_output=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"--kubernetes: kubectl apply: {lines[-1].strip().removeprefix('error: ')}")


def _pods_a_replica(model: Model) -> int:
    if strategy(model) == "STRICT_SPREAD":
        return max(1, len(bundles(model)))
    if not on_gpus(model):
        return 1
    return max(1, math.ceil(reserved(model)["GPU"] / model.hardware.gpus_per_node))


def _memory_gib(model: Model) -> tuple[float, tuple[str, ...]]:
    """Of one replica; and what was assumed."""
    hardware, ranks = model.hardware, model.parallel.data * model.parallel.devices_per_rank
    notes: tuple[str, ...] = ()
    if hardware.memory_gib is not None:
        held = hardware.memory_gib
    else:
        held = float(UNKNOWN_GIB * ranks)
        notes = (f"hardware.memory_gib: not set for {model.name!r}; a replica's pods get {held:g} GiB for it",)
    if not on_gpus(model):
        held += hardware.kv_cache_gib * ranks
    return held + (hardware.kv_offload_gib or 0), notes


def _pod(name: str, image: str, limits: dict[str, str]) -> Manifest:
    container: Manifest = {
        "name": name,
        "image": image,
        "resources": {"limits": limits, "requests": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    return {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        }
    }
