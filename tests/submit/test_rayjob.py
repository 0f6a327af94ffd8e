from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from hycluster.batch.job import Job
from hycluster.errors import SettingsError, Unavailable
from hycluster.settings.as_yaml import as_yaml
from hycluster.settings.read import load_settings
from hycluster.settings.settings import Settings
from hycluster.submit import rayjob
from hycluster.submit.submission import Submission, submission
from hycluster.submit.target import KubernetesTarget

ROOT = Path(__file__).parents[2]


def job_on(engine: str, model: str = "smollm2-135m-instruct") -> Job:
    return Job.model_validate(
        {
            "name": "nightly",
            "model": model,
            "task": "generate",
            "prompt": "two\nlines of {text}",
            "input": {"path": "s3://bucket/in"},
            "output": {"path": "s3://bucket/out"},
            "engine": engine,
            "generate_processes": 2,
        }
    )


def manifest(
    job: Job, settings: Settings | None, target: KubernetesTarget
) -> tuple[Submission, dict[str, Any], tuple[str, ...]]:
    sent = submission(job, settings)
    made, notes = rayjob.ray_job(sent, job, settings, target)
    return sent, yaml.safe_load(as_yaml(made)), notes


def test_a_job_for_a_cluster_that_serves() -> None:
    sent, made, notes = manifest(job_on("shared"), None, KubernetesTarget(cluster="hycluster-x7k2p", namespace="ml"))
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == (sent.id, "ml")
    assert made["spec"] == {
        "submissionMode": "HTTPMode",
        "jobId": sent.id,
        "metadata": {"hycluster_job": "nightly", "hycluster_output": "s3://bucket/out"},
        "entrypoint": sent.command,
        "clusterSelector": {"ray.io/cluster": "hycluster-x7k2p"},
        # KubeRay refuses anything else beside a selector, and a time to live without a shutdown.
        "backoffLimit": 0,
    }
    assert notes == ()


def test_a_cluster_of_its_own_has_room_for_the_engines() -> None:
    settings = load_settings(ROOT / "deployments" / "local.yaml")
    _, made, notes = manifest(job_on("dedicated"), settings, KubernetesTarget())
    spec = made["spec"]
    assert (spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == (True, 1)
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 1
    (container,) = group["template"]["spec"]["containers"]
    # 1 CPU of the engine and 2 of the processes that feed it; 8 GiB assumed, 2 of KV cache, 6 beside.
    assert container["resources"]["limits"] == {"cpu": "3", "memory": "16Gi"} == container["resources"]["requests"]
    assert container["image"] == rayjob.default_image(settings.models[0])
    assert [note.partition(":")[0] for note in notes] == ["hardware.memory_gib"]
    for pod in (cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize(
    ("changes", "pods", "limits"),
    [
        # One replica over two nodes.
        ({"parallel": {"tensor": 8, "data": 2}}, 2, {"cpu": "18", "memory": "56Gi", "nvidia.com/gpu": "8"}),
        (
            {"parallel": {"tensor": 4}, "replicas": {"min": 3}},
            3,
            {"cpu": "18", "memory": "106Gi", "nvidia.com/gpu": "4"},
        ),
        # Ranks that must not meet on a node.
        (
            {"parallel": {"data": 4}, "hardware": {"placement": "strict_spread"}},
            4,
            {"cpu": "18", "memory": "31Gi", "nvidia.com/gpu": "1"},
        ),
    ],
)
def test_gpus_are_cut_into_nodes(changes: dict[str, Any], pods: int, limits: dict[str, str]) -> None:
    hardware = {"accelerator": "H20", "cpus": 16, "memory_gib": 100} | changes.pop("hardware", {})
    model = {"name": "big", "source": "org/big", "hardware": hardware, **changes}
    _, made, notes = manifest(
        job_on("dedicated", "big"), Settings.model_validate({"models": [model]}), KubernetesTarget(image="i:1")
    )
    (group,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (group["replicas"], container["resources"]["limits"], container["image"]) == (pods, limits, "i:1")
    assert notes == ()


def test_weights_in_a_folder_are_noted() -> None:
    settings = Settings.model_validate(
        {"models": [{"name": "m", "source": "/models/m", "hardware": {"memory_gib": 1}}]}
    )
    assert (
        "source: '/models/m' must be in the image"
        in manifest(job_on("dedicated", "m"), settings, KubernetesTarget())[2][0]
    )


TEMPLATE = """
apiVersion: v1
kind: ConfigMap
metadata: {name: beside}
---
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: template, namespace: ml, labels: {kueue.x-k8s.io/queue-name: batch}}
spec: {entrypoint: nothing, rayClusterSpec: {headGroupSpec: {mine: true}}}
"""


@pytest.mark.parametrize("source", ["file", "-"])
def test_a_template_gives_the_cluster_and_the_labels(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "template.yaml"
    path.write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO(TEMPLATE))
    target = KubernetesTarget(template=str(path) if source == "file" else "-")
    sent, made, _ = manifest(job_on("dedicated"), load_settings(ROOT / "deployments" / "local.yaml"), target)
    assert made["spec"]["rayClusterSpec"] == {"headGroupSpec": {"mine": True}}
    assert made["spec"]["entrypoint"] == sent.command
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "batch"
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == (sent.id, "ml")
    target = dataclasses.replace(target, template=str(path), namespace="mine")
    assert rayjob.ray_job(sent, job_on("dedicated"), None, target)[0]["metadata"]["namespace"] == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: RayService\nspec: {rayClusterConfig: {a: 1}}", "has 0 manifests with a cluster"),
        (TEMPLATE + "---\nkind: RayCluster\nspec: {a: 1}\n", "has 2 manifests with a cluster"),
        ("kind: RayJob\nspec: {clusterSelector: {ray.io/cluster: x}}", "has 0 manifests"),
        ("kind: [", "can't be read"),
        (None, "No such file"),
    ],
)
def test_a_template_without_one_cluster_is_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "template.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=said) as caught:
        rayjob.template(str(path))
    assert str(caught.value).startswith("--template: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster": "a", "image": "i"}, "--image: not allowed beside --cluster"),
        ({"template": "t", "image": "i"}, "--image: not allowed beside --template"),
        ({"cluster": "Big One"}, "--cluster: 'Big One' is not allowed"),
        ({"namespace": "-x"}, "--namespace: '-x' is not allowed"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        KubernetesTarget(**options)  # type: ignore[arg-type]


def test_kubectl_is_given_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="there is no kubectl on PATH"):
        rayjob.apply({"kind": "RayJob"})
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/args\n/bin/cat > {tmp_path}/given\n')
    kubectl.chmod(0o755)
    rayjob.apply({"kind": "RayJob", "spec": {"entrypoint": "a\nb"}})
    assert (tmp_path / "args").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "given").read_text()) == {"kind": "RayJob", "spec": {"entrypoint": "a\nb"}}
    kubectl.write_text("#!/bin/sh\necho 'warning' >&2\necho 'error: no such namespace' >&2\nexit 1\n")
    with pytest.raises(Unavailable, match=r"^--kubernetes: kubectl apply: no such namespace$"):
        rayjob.apply({"kind": "RayJob"})
