"""The Helm chart says what the overlays say; wrong values are refused, by Helm or by ``hycluster k8s check``."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hycluster.auth.database import VARIABLE as KEYS_DATABASE
from hycluster.cli import app
from hycluster.k8s.chart.defaults import values_of
from hycluster.k8s.chart.make import chart_files, surplus
from hycluster.k8s.chart.values import values_schema
from hycluster.k8s.check import Violation, broken, faults
from hycluster.k8s.render import BESIDE, OVERLAY_MANIFEST, PODS_PATCH, render_manifests, serve_config
from hycluster.settings.read import load_yaml
from tests.k8s.chart_values import CLUSTER, LARGE, everything, overlay, values
from tests.k8s.helm import CHART, Refused, lint, notes, template
from tests.k8s.kustomize import K8S, OVERLAYS, ROOT, built, with_components

Resource = dict[str, Any]
# What Helm's chart has besides: labels of every object, none of them on pods.
LABELS = {"helm.sh/chart", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by"}
# Values of a chart for a Gateway, Prometheus, a fabric: by the component that says the same.
COMPONENTS = ("gateway-routes", "gang-scheduling", "hub-egress", "rdma", "service-monitor")


def normal(resources: list[Resource]) -> dict[str, Resource]:
    """By kind and name, without what is told apart on purpose."""
    found = {}
    for resource in copy.deepcopy(resources):
        metadata = resource["metadata"]
        metadata["labels"] = {k: v for k, v in metadata.get("labels", {}).items() if k not in LABELS}
        # The file that an overlay was made from; an uninstalled release's volume.
        for own in ("hycluster/settings", "helm.sh/resource-policy"):
            metadata.get("annotations", {}).pop(own, None)
        metadata["annotations"] = metadata.get("annotations", {})
        if resource["kind"] == "RayService":
            resource["spec"]["serveConfigV2"] = yaml.safe_load(resource["spec"]["serveConfigV2"])
        found[f"{resource['kind']}/{metadata['name']}"] = resource
    return found


def service(resources: list[Resource]) -> Resource:
    (found,) = (resource for resource in resources if resource["kind"] == "RayService")
    return found


def said(resources: list[Resource], find: Callable[[list[Resource]], list[Violation]] = faults) -> str:
    return "\n".join(map(str, find(resources)))


def test_the_chart_has_not_drifted() -> None:
    """If this fails, run 'hycluster k8s render'."""
    files = chart_files(ROOT)
    for file, text in files.items():
        assert file.read_text() == text, file
    assert surplus(ROOT, files) == []


def test_helm_finds_nothing_to_lint() -> None:
    assert lint({}) == []


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_it_makes_what_the_overlay_makes(folder: Path) -> None:
    """And test_manifests.py finds nothing wrong with that."""
    assert normal(template(values(folder.name))) == normal(overlay(folder.name))


def test_its_own_values_are_the_dev_overlay() -> None:
    chart = template({})
    assert normal(template({} | CLUSTER)) == normal(overlay("dev"))
    assert said(chart) == ""


# Variables are in the order of components, which an overlay with weights has otherwise.
@pytest.mark.parametrize(("folder", "names"), [(LARGE, COMPONENTS), ("dev", ("keys-database",))], ids=[LARGE, "dev"])
def test_it_makes_what_components_make(tmp_path: Path, folder: str, names: tuple[str, ...]) -> None:
    components = [K8S / "components" / name for name in names]
    resources = with_components(K8S / "overlays" / folder, components, tmp_path)
    chart = template(values_of(copy.deepcopy(resources)) | CLUSTER)
    assert normal(chart) == normal(resources)
    assert said(chart) == ""


def test_it_makes_what_an_overlay_of_two_models_makes(tmp_path: Path) -> None:
    """On different GPUs; one may sleep, the other is over two hosts."""
    gpus = [("H20", {"tensor": 8, "data": 2}, {"min": 2}), ("H100", {"tensor": 4}, {"min": 0, "max": 3, "initial": 1})]
    models = [
        {"name": f"Org/On-{gpu}", "source": "org/m", "parallel": parallel, "replicas": replicas}
        | {"hardware": {"accelerator": gpu, "cpus": 4}}
        for gpu, parallel, replicas in gpus
    ]
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump({"models": models, "ingress": {"replicas": 3}, "drain_timeout_s": 7.5})
    )
    for file, text in render_manifests(tmp_path / OVERLAY_MANIFEST, str(tmp_path / "settings.yaml"), ROOT).items():
        file.write_text(text)
    own = {
        "namespace": "hycluster",
        "resources": [os.path.relpath(K8S / "base", tmp_path), BESIDE],
        "components": [os.path.relpath(K8S / "components" / name, tmp_path) for name in ("gpu", "hub-egress")],
        "patches": [{"path": OVERLAY_MANIFEST}, {"path": PODS_PATCH, "target": {"kind": "RayService"}}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    resources = built(tmp_path)
    chart = template(values_of(copy.deepcopy(resources)) | CLUSTER)
    assert len(service(chart)["spec"]["rayClusterConfig"]["workerGroupSpecs"]) == 3
    assert normal(chart) == normal(resources)
    assert said(chart, broken) == ""


def test_it_makes_the_cluster_s_part_if_asked() -> None:
    cluster = built(K8S / "cluster")
    chart = template({"namespace": {"create": True}})
    assert normal(cluster).items() <= normal(chart).items()
    assert said(chart) == ""


def test_locking_memory_is_allowed_and_asked_for(tmp_path: Path) -> None:
    asked = {"rdma": {"enabled": True, "ipcLock": True}, "namespace": {"create": True}}
    chart = template(values(LARGE) | asked)
    assert (
        normal(built(K8S / "cluster-ipc-lock")).items()
        >= {name: resource for name, resource in normal(chart).items() if resource["kind"] == "Namespace"}.items()
    )
    assert said(chart) == ""


def test_every_value_arrives() -> None:
    chart = template(everything())
    assert said(chart) == ""
    assert {r["metadata"].get("namespace", "llm") for r in chart} == {"llm"}
    found = normal(chart)
    cluster = service(chart)["spec"]["rayClusterConfig"]
    ingresses, engines = cluster["workerGroupSpecs"]
    image = f"registry.example.com:5000/llm/hycluster:0.1.0-gpu@sha256:{'0' * 64}"
    for group in (cluster["headGroupSpec"], ingresses, engines):
        spec = group["template"]["spec"]
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            assert (container["image"], container["imagePullPolicy"]) == (image, "Always")
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert cluster["authOptions"]["secretName"] == "ray-token"
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis.data:6380"
    assert "StatefulSet/hycluster-redis" not in found
    assert engines["template"]["spec"]["containers"][0]["resources"]["limits"]["rdma/hca"] == "1"
    assert ingresses["template"]["spec"]["terminationGracePeriodSeconds"] == 600
    (store,) = ingresses["template"]["spec"]["containers"][0]["envFrom"]
    assert store["secretRef"]["name"] == "hycluster-s3"
    (keys,) = (e for e in ingresses["template"]["spec"]["containers"][0]["env"] if e["name"] == KEYS_DATABASE)
    assert keys["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "url"}
    (way,) = found["NetworkPolicy/hycluster-keys-database"]["spec"]["egress"]
    assert way == {"to": [{"ipBlock": {"cidr": "203.0.113.9/32"}}], "ports": [{"port": 6432}]}
    assert found["PersistentVolumeClaim/hycluster-weights"]["spec"]["storageClassName"] == "shared"
    assert found["HTTPRoute/hycluster"]["spec"]["hostnames"] == ["a.example.com", "b.example.com"]
    ingress = found["Ingress/hycluster"]["spec"]
    assert ingress["tls"] == [{"hosts": ["a.example.com", "b.example.com"], "secretName": "tls"}]
    assert [rule["host"] for rule in ingress["rules"]] == ["a.example.com", "b.example.com"]
    paths = {
        path["path"] for rule in found["Ingress/hycluster-grpc"]["spec"]["rules"] for path in rule["http"]["paths"]
    }
    assert paths == {"/hycluster.v1.Inference/", "/grpc.health.v1.Health/"}
    assert found["ServiceMonitor/hycluster-ingress"]["metadata"]["labels"] == {"release": "prometheus"}


def test_who_authenticates_may_be_said_in_words() -> None:
    said_so = {"gateway": {"enabled": True, "authenticatedBy": "the mesh's JWT policy"}}
    chart = template(said_so)
    assert said(chart, broken) == ""
    for name in ("HTTPRoute/hycluster", "GRPCRoute/hycluster"):
        route = normal(chart)[name]
        assert route["metadata"]["annotations"] == {"hycluster/authenticated-by": "the mesh's JWT policy"}
        assert "filters" not in route["spec"]["rules"][0]


MODEL = {"name": "Org/One.5", "source": "org/one"}
SETTINGS: list[dict[str, Any]] = [
    {"models": [MODEL]},
    {"models": [MODEL], "ingress": {"replicas": 3}, "drain_timeout_s": 12.5, "batches": {"store": "s3://bucket"}},
    {"models": [MODEL | {"hardware": {"memory_gib": None}}], "batches": None, "admission": {"max_requests": None}},
    {"models": [MODEL], "batches": {"max_lines": 5}, "data_plane": {"host": "127.0.0.1"}},
    {"models": [MODEL | {"engine": {"max_model_len": 10_000_000}}], "http": {"port": 1, "max_body_mib": 8}},
    {"models": [MODEL | {"replicas": {"min": 0, "max": 3, "initial": 1}}, {"name": "two", "source": "two"}]},
    {"models": [MODEL | {"hardware": {"resources": {"fast": 0.5}}}, {"name": "two", "source": "two"}]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_are_fitted_as_render_fits_them(settings: dict[str, Any]) -> None:
    size = {"cpu": 2, "memory": "8Gi"}
    resources = {"requests": size, "limits": size}
    told = [model.get("hardware", {}).get("resources", {}) for model in settings["models"]]
    engines = [{"resources": resources, "rayResources": dict.fromkeys(names, "1")} for names in told]
    chart = template({"settings": settings, "engines": engines, "hubEgress": True})
    run = yaml.safe_load(service(chart)["spec"]["serveConfigV2"])
    assert run == serve_config(settings, "settings")
    assert said(chart, broken) == ""


@pytest.mark.parametrize("file", ["hunyuan-large-bf16-16xh20", "hunyuan-a13b-fp8-2xh20", "local"])
def test_values_for_settings_make_pods_of_their_size(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["k8s", "values", f"deployments/{file}.yaml"])
    assert result.exit_code == 0, result.output
    given = yaml.safe_load(result.output)
    if given.get("weights", {}).get("folder"):
        with pytest.raises(Refused, match=r"weights\.repo: must be a hub id"):
            template(given)
        given["weights"]["repo"] = "org/repo"
    chart = template(given)
    assert said(chart, broken) == ""
    run = yaml.safe_load(service(chart)["spec"]["serveConfigV2"])
    assert run == serve_config(load_yaml(f"deployments/{file}.yaml"), file)


def test_values_of_an_overlay_come_from_a_pipe_too() -> None:
    stream = yaml.safe_dump_all(overlay("dev"))
    result = CliRunner().invoke(app, ["k8s", "values", "-"], input=stream)
    assert yaml.safe_load(result.output) == values_of(copy.deepcopy(overlay("dev")))
    wrong = CliRunner().invoke(app, ["k8s", "values", "-"], input=yaml.safe_dump_all(overlay("dev")[:1]))
    assert (wrong.exit_code, "these are not hycluster's for serving" in f"{wrong.exception}") == (1, True)


def test_values_say_what_they_can_not_carry_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert CliRunner().invoke(app, ["k8s", "values", "-"], input=yaml.safe_dump_all(overlay(LARGE))).stderr == ""
    made = copy.deepcopy(overlay("dev"))
    groups = service(made)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    groups[1]["template"]["spec"]["containers"][0]["env"] += [{"name": "VLLM_USE_X", "value": "1"}]
    result = CliRunner().invoke(app, ["k8s", "values", "-"], input=yaml.safe_dump_all(made))
    assert result.stderr == (
        "not carried over, the chart has no value for it: RayService/hycluster: spec.rayClusterConfig"
        ".workerGroupSpecs[1].template.spec.containers[0].env: VLLM_USE_X=1\n"
    )


def test_values_of_what_can_not_be_are_refused_in_words() -> None:
    made = copy.deepcopy(overlay("dev"))
    service(made)["metadata"]["name"] = "prod-hycluster"
    said = CliRunner().invoke(app, ["k8s", "values", "-"], input=yaml.safe_dump_all(made)).exception
    assert "RayService/prod-hycluster: must be RayService/hycluster; the chart's names are fixed" in str(said)
    said = CliRunner().invoke(app, ["k8s", "values", "nowhere.yaml"]).exception
    assert str(said).startswith("SETTINGS: 'nowhere.yaml' is not there; give a settings file")


GONE = object()
GPU = "engines.0.resources.limits.nvidia.com/gpu"

# What Helm itself refuses: by the schema, or by the chart's own checks. Of the largest overlay's values.
REFUSED: list[tuple[str, Any, str]] = [
    ("imge", {}, "'imge'"),
    ("image.tagg", "x", "/image': additional properties 'tagg'"),
    ("image.tag", "", "/image/tag"),
    ("image.tag", "latest", "/image/tag"),
    ("image.repository", "Registry/HyCluster:1", "/image/repository"),
    ("image.digest", "sha256:12", "/image/digest"),
    ("image.pullPolicy", "Sometimes", "/image/pullPolicy"),
    ("imagePullSecrets", "registry", "/imagePullSecrets': got string, want array"),
    ("imagePullSecrets", [{"name": "registry"}], "/imagePullSecrets/0"),
    ("namespace", "llm", "/namespace': got string"),
    ("settings.ingress", {"replicas": 0}, "/settings/ingress/replicas"),
    ("settings.ingress", {"replicas": 1}, "/settings/ingress/replicas': minimum: got 1, want 2"),
    ("settings.drain_timeout", 300, "'drain_timeout'"),
    ("settings.drain_timeout_s", "300s", "/settings/drain_timeout_s"),
    ("settings.models", [], "/settings/models"),
    ("settings.models.0.sorce", "x", "/settings/models/0': additional properties 'sorce'"),
    ("settings.models.0.source", "./large", "/settings/models/0/source"),
    ("settings.models.0.hardware.cpus", 0, "/settings/models/0/hardware/cpus"),
    ("settings.batches", {"store": "s3:/bucket"}, "/settings/batches"),
    ("settings.batches", {"store": "S3://bucket"}, "/settings/batches"),
    ("settings.batches", {"store": "s3://"}, "/settings/batches"),
    ("settings.batches", {"store": "batches"}, "/settings/batches"),
    ("settings.http", {"port": "http"}, "/settings/http/port"),
    ("settings.admission", {"max_request": 1}, "'max_request'"),
    ("settings.models.0.parallel.data", 4, "engines.0.resources.limits: nvidia.com/gpu: 8 on each of 2 hosts"),
    ("terminationGracePeriodSeconds", 300, "terminationGracePeriodSeconds: 300 is too short"),
    ("terminationGracePeriodSeconds", 900_000, "/terminationGracePeriodSeconds"),
    ("settings.drain_timeout_s", 100_000, "/settings/drain_timeout_s"),
    ("settings.models.0.hardware.node_selector", {"gpu": "NVIDIA H20"}, "/settings/models/0/hardware/node_selector"),
    ("engines.0.nodeSelector", {"gpu": "NVIDIA H20"}, "/engines/0/nodeSelector"),
    ("weights.repo", "https://huggingface.co/a/b", "/weights/repo"),
    ("engines", [], "/engines"),
    ("engines.0.replicas", 2, "/engines/0': additional properties 'replicas'"),
    ("engines.0.hosts", 1, "engines.0.resources.limits: nvidia.com/gpu: 8 on each of 1 hosts"),
    (GPU, GONE, "engines.0.resources.limits: nvidia.com/gpu: must be set"),
    ("engines.0.nodeSelector", GONE, "engines.0.nodeSelector: must say which nodes have the accelerator H20"),
    ("engines.0.tolerations.0.efect", "NoSchedule", "'efect'"),
    ("engines.0.resources.request", {}, "'request'"),
    ("engines.0.resources.requests.cpu", GONE, "/engines/0/resources/requests': missing property 'cpu'"),
    ("engines.0.resources.requests.cpu", "1500m", "engines.0.resources.requests.cpu: 1500m must be a whole number"),
    ("engines.0.resources.limits.memory", "512Gi", "engines.0.resources.limits.memory: must be what is requested"),
    ("engines.0.resources.requests.memory", "lots", "/engines/0/resources/requests/memory"),
    ("engines.0.sharedMemory", "32G", "/engines/0/sharedMemory"),
    ("ingressPods.resources.limits.memory", "5Gi", "ingressPods.resources.limits.memory"),
    ("weights.repo", "", "weights.repo: must be a hub id"),
    ("weights.size", "big", "/weights/size"),
    ("redis.enabled", False, "redis.address: must be HOST:PORT"),
    ("redis.address", "redis:6379", "redis.address: redis:6379 is without effect"),
    ("redis.address", "redis", "/redis/address"),
    ("redis.image", "redis", "/redis/image"),
    ("hosts", {"http": []}, "/hosts/http"),
    ("ingress", {"enabled": True}, "ingress.annotations"),
    ("gateway", {"enable": True}, "'enable'"),
    ("rdma", {"ipcLock": True}, "rdma.ipcLock"),
    ("networkPolicies.clients", [{"namespaceLabels": {}}], "/networkPolicies/clients/0/namespaceLabels"),
    ("networkPolicies.apiServerCidrs", ["anywhere"], "/networkPolicies/apiServerCidrs/0"),
    ("metrics", {"enabled": "yes"}, "/metrics/enabled': got string, want boolean"),
]
# What only the rules see, in what is rendered.
FOUND: list[tuple[str, Any, str]] = [
    ("engines.0.resources.limits.cpu", "8", "CPUs in 1 x 2 pods"),
    ("engines.0.priorityClassName", "", "priorityClassName: there is none"),
    ("engines.0.sharedMemory", "256Mi", "object-store-memory"),
    ("settings.batches", {"store": "/models/batches"}, "below a volumeMount"),
    ("settings.batches", {"store": "/tmp/batches"}, "a folder of its own"),
    ("weights.enabled", False, "the engine would find no weights"),
    ("networkPolicies.clients.0.namespaceLabels", {"team": "search"}, "all pods of namespaces"),
]


def planted(given: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with a value set; only the last step may have dots in it."""
    changed = copy.deepcopy(given)
    target: Any = changed
    steps = path.removesuffix(".nvidia.com/gpu").split(".") + (["nvidia.com/gpu"] if path == GPU else [])
    for step in steps[:-1]:
        target = target[int(step)] if isinstance(target, list) else target[step]
    if value is GONE:
        del target[steps[-1]]
    else:
        target[steps[-1]] = value
    return changed


@pytest.mark.parametrize(("path", "value", "why"), REFUSED)
def test_a_wrong_value_is_refused_by_name(path: str, value: Any, why: str) -> None:
    with pytest.raises(Refused) as refused:
        template(planted(values(LARGE), path, value))
    assert why in str(refused.value)


@pytest.mark.parametrize(("path", "value", "why"), FOUND)
def test_what_helm_takes_the_rules_find(path: str, value: Any, why: str) -> None:
    assert why in said(template(planted(values(LARGE), path, value)), broken)


def test_no_key_is_free_that_need_not_be() -> None:
    """What the schema does not close, it says so: an engine's arguments, maps of names, and Helm's own ``global``."""
    free = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object" and node.get("additionalProperties", True) is True:
                free.append(path)
            for key, value in node.items():
                walk(value, f"{path}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                walk(value, f"{path}/{index}")

    walk(values_schema(), "")
    assert free == [
        "/definitions/Model/properties/engine",
        "/definitions/Model/properties/api",
        "/properties/global",
    ]
    assert json.loads((CHART / "values.schema.json").read_text()) == values_schema()


def test_notes_say_how_to_reach_it_and_what_must_be_there() -> None:
    told = notes(everything())
    for needed in (
        "ray-token",
        "Secret redis: secret",
        "Secret registry",
        "hycluster-s3",
        "Secret tls",
        "Gateway edge",
    ):
        assert needed in told
    assert "https://a.example.com/v1" in told
    assert "port-forward service/hycluster 8000" in notes({})
