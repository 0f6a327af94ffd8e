"""How the chart follows the manifests: what changes in them arrives by itself, what vanishes is an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hycluster.errors import SettingsError
from hycluster.k8s.chart.make import made
from hycluster.k8s.chart.nodes import Block, Each, IfAny, Lines, Scalar, When, text
from hycluster.k8s.chart.source import HERE, add_component, patched
from tests.k8s.kustomize import ROOT

SERVICE = "k8s/base/rayservice.yaml"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for folder in ("deployments", "k8s"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def change(file: Path, right: str, wrong: str) -> None:
    content = file.read_text()
    assert right in content
    file.write_text(content.replace(right, wrong))


def test_a_new_field_of_the_base_arrives(repository: Path) -> None:
    change(
        repository / SERVICE, "  excludeHeadPodFromServeSvc: true", "  excludeHeadPodFromServeSvc: true\n  newField: 7"
    )
    assert "  newField: 7\n" in made(repository)["templates/rayservice.yaml"]


def test_a_new_file_of_the_base_arrives(repository: Path) -> None:
    base = repository / "k8s" / "base"
    (base / "more.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: more\n")
    change(base / "kustomization.yaml", "  - redis.yaml", "  - redis.yaml\n  - more.yaml")
    assert "name: more\n" in made(repository)["templates/more.yaml"]


def test_a_patch_of_a_component_arrives_on_its_condition(repository: Path) -> None:
    component = repository / "k8s" / "components" / "gang-scheduling" / "kustomization.yaml"
    with component.open("a") as file:
        file.write("      - op: replace\n        path: /spec/upgradeStrategy/type\n        value: None\n")
    assert (
        "    {{- if $.Values.gangScheduling }}\n    type: None\n    {{- else }}\n    type: NewCluster\n    {{- end }}\n"
        in made(repository)["templates/rayservice.yaml"]
    )


@pytest.mark.parametrize(
    ("file", "right", "wrong", "said"),
    [
        (SERVICE, "secretName: hycluster-ray", "secret: x", r"REPLACED: .*secretName: there is no such path any more"),
        (SERVICE, "groupName: engines", "groupName: gpus", r"workerGroupSpecs/1/groupName: is not 'engines'"),
        (SERVICE, "excludeHeadPodFromServeSvc: true", "serveConfigV2: x", r"ADDED: .*serveConfigV2: is there already"),
        ("k8s/components/rdma/kustomization.yaml", "template/spec/affinity", "templat/spec/x", r"rdma.*no such path"),
        ("k8s/base/kustomization.yaml", "resources:", "namePrefix: x-\nresources:", r"\['namePrefix'\]"),
    ],
)  # fmt: skip
def test_what_is_not_as_the_table_has_it_is_an_error(
    repository: Path, file: str, right: str, wrong: str, said: str
) -> None:
    change(repository / file, right, wrong)
    with pytest.raises(SettingsError, match=said):
        made(repository)


def test_a_component_that_nobody_decided_on_is_an_error(repository: Path) -> None:
    shutil.copytree(repository / "k8s/components/hub-egress", repository / "k8s/components/other")
    with pytest.raises(SettingsError, match=r"components/other: .*COMPONENTS: must say what the chart does with it"):
        made(repository)


def test_a_manifest_s_own_braces_are_no_expression() -> None:
    assert text({"a": "{{ x }}", "b": ["{{ y }}\nz\n"]}) == (
        'a: \'{{ "{{" }} x }}\'\nb:\n  - |\n    {{ "{{" }} y }}\n    z\n'
    )


def test_nodes_are_written_where_they_stand() -> None:
    manifest = {
        "scalar": Scalar(".a"),
        "block": Block(".b"),
        "maybe": IfAny(".c"),
        "text": Lines(".d"),
        "list": [{"first": When(".e", 1), "second": When(".f", 2, 3)}, Each("$x := .g", Scalar("$x")), IfAny(".h")],
        "empty": {},
    }
    assert text(manifest).splitlines() == [
        "scalar: {{ .a | toJson }}",
        "block:",
        "  {{- toYaml (.b) | nindent 2 }}",
        "{{- with .c }}",
        "maybe:",
        "  {{- toYaml . | nindent 2 }}",
        "{{- end }}",
        "text: |",
        "  {{- .d | nindent 2 }}",
        "list:",
        "  -",
        "    {{- if .e }}",
        "    first: 1",
        "    {{- end }}",
        "    {{- if .f }}",
        "    second: 2",
        "    {{- else }}",
        "    second: 3",
        "    {{- end }}",
        "  {{- range $x := .g }}",
        "  - {{ $x | toJson }}",
        "  {{- end }}",
        "  {{- with .h }}",
        "  {{- toYaml . | nindent 2 }}",
        "  {{- end }}",
        "empty: {}",
    ]


OPERATIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"op": "add", "path": "/list/-", "value": 2}, {"list": [{"a": 1}, 2], "map": {"k": "v"}}),
    ({"op": "copy", "from": "/list/0", "path": "/list/1"}, {"list": [{"a": 1}, {"a": 1}], "map": {"k": "v"}}),
    ({"op": "add", "path": "/map/x~1y", "value": 1}, {"list": [{"a": 1}], "map": {"k": "v", "x/y": 1}}),
    ({"op": "replace", "path": "/list/0/a", "value": 3}, {"list": [{"a": 3}], "map": {"k": "v"}}),
    ({"op": "test", "path": "/map/k", "value": "v"}, {"list": [{"a": 1}], "map": {"k": "v"}}),
]


@pytest.mark.parametrize(("operation", "result"), OPERATIONS)
def test_a_json_patch_is_applied(operation: dict[str, Any], result: dict[str, Any]) -> None:
    before = {"list": [{"a": 1}], "map": {"k": "v"}}
    assert patched(before, [operation], Path("p")) == result
    assert before == {"list": [{"a": 1}], "map": {"k": "v"}}


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({"op": "test", "path": "/map/k", "value": "w"}, "/map/k: is not 'w'"),
        ({"op": "replace", "path": "/map/none/x", "value": 1}, "there is no such path"),
        ({"op": "add", "path": "/list/5", "value": 1}, "can't be put into a template"),
        ({"op": "move", "from": "/map", "path": "/list"}, "can't be put into a template"),
    ],
)
def test_a_json_patch_that_can_t_be_is_an_error(operation: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        patched({"list": [{"a": 1}], "map": {"k": "v"}}, [operation], Path("p"))


def test_a_component_for_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    patch = {"target": {"kind": "RayService"}, "patch": "[]"}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"kind": "Component", "patches": [patch]}))
    with pytest.raises(SettingsError, match="there is no such manifest"):
        add_component({}, tmp_path, HERE)
