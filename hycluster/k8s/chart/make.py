"""The chart's files, as text: templates from ``k8s/base`` and ``k8s/components``, values, schema, README."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hycluster import __version__
from hycluster.config import Settings
from hycluster.errors import SettingsError
from hycluster.k8s.chart import source, table, values
from hycluster.k8s.chart.defaults import defaults
from hycluster.k8s.chart.describe import readme, values_yaml
from hycluster.k8s.chart.ingress import ingresses
from hycluster.k8s.chart.nodes import Each, IfAny, Scalar, When, text
from hycluster.k8s.render import DOOR_RESOURCES, DOORS, PORTS, serve_config

CHART = Path("k8s/chart")
# Beside these, which are made, the folder has what is written by hand.
BY_HAND = {"templates/_helpers.tpl", "templates/_checks.tpl", "templates/NOTES.txt"}
MADE_BY = "Made by 'hycluster k8s render' from"


def made(root: Path) -> dict[str, str]:
    """Every file that is made, by its name in the chart's folder.

    Raises:
        SettingsError: the manifests are not as the chart's table expects them.
    """
    files = {
        "Chart.yaml": _about(),
        "values.yaml": values_yaml(defaults(root)),
        "values.schema.json": json.dumps(values.schema(), indent=1, ensure_ascii=False) + "\n",
        "README.md": readme(),
        "templates/_constants.tpl": _constants(root),
    }
    for name, (origin, resources) in _manifests(root / "k8s").items():
        files[f"templates/{name}"] = f"{{{{- /* {MADE_BY} {origin}. */ -}}}}\n" + "".join(map(_document, resources))
    files["templates/rayservice.yaml"] = '{{- include "hycluster.checks" $ -}}\n' + files["templates/rayservice.yaml"]
    return files


def chart_files(root: Path) -> dict[Path, str]:
    """As :func:`made`, by path."""
    return {root / CHART / name: content for name, content in made(root).items()}


def surplus(root: Path) -> list[Path]:
    """Files in the chart that are neither made nor written by hand: what made them is gone."""
    wanted = made(root).keys() | BY_HAND
    there = (file for file in (root / CHART).rglob("*") if file.is_file())
    return sorted(file for file in there if file.relative_to(root / CHART).as_posix() not in wanted)


def _manifests(k8s: Path) -> dict[str, tuple[str, list[Any]]]:
    """Resources with the values' expressions in them, by template; with the file that they come from."""
    parts = source.base(k8s / "base")
    origins = {name: f"k8s/base/{name}" for name in parts}
    conditions: dict[str, str] = {}
    for folder in sorted(path.parent for path in (k8s / "components").glob("*/kustomization.yaml")):
        if folder.name not in table.COMPONENTS:
            raise SettingsError(
                f"{folder}: hycluster/k8s/chart/table.py: COMPONENTS: must say what the chart does of it"
            )
        condition = table.COMPONENTS[folder.name]
        if condition is None:
            continue
        for file, resources in source.add_component(parts, folder, condition).items():
            name = f"{folder.name}-{file}" if file in parts or file == "network-policy.yaml" else file
            parts[name], origins[name] = resources, f"k8s/components/{folder.name}/{file}"
            conditions |= {_name(resource): condition for resource in resources}
    parts |= copy.deepcopy(table.EXTRA) | {"ingress.yaml": ingresses(parts["routes.yaml"])}
    origins |= dict.fromkeys(table.EXTRA, "hycluster/k8s/chart/table.py") | {"ingress.yaml": origins["routes.yaml"]}
    by_name = {_name(resource): resource for resources in parts.values() for resource in resources}
    _fill(by_name)
    for resource in by_name.values():
        _common(resource)
    conditions |= table.RESOURCES
    if unknown := table.RESOURCES.keys() - by_name.keys():
        raise SettingsError(f"hycluster/k8s/chart/table.py: RESOURCES: {sorted(unknown)}: there is no such manifest")
    return {
        name: (origins[name], [When(conditions.get(_name(r), ""), r) for r in resources])
        for name, resources in parts.items()
    }


def _name(resource: dict[str, Any]) -> str:
    return f"{resource['kind']}/{resource['metadata']['name']}"


def _fill(by_name: dict[str, Any]) -> None:
    for path, node in table.REPLACED.items():
        parent, key = _found(by_name, path, "REPLACED")
        parent[key] = node(parent[key]) if callable(node) else node
    for path, node in table.ADDED.items():
        above, _, key = path.rpartition("/")
        holder, last = _found(by_name, above, "ADDED")
        parent = source.through(holder[last])
        if key == "-":
            parent.append(node)
        elif key in parent:
            raise SettingsError(f"hycluster/k8s/chart/table.py: ADDED: {path}: is there already")
        else:
            parent[key] = node
    for path, pods in table.PODS.items():
        holder, last = _found(by_name, f"{path}/template/spec", "PODS")
        _placed(holder[last], pods)
    # Last: from here on the group has no name to find it by.
    groups, key = _found(by_name, table.GROUP, "GROUP")
    groups[key] = Each(table.EACH, groups[key] | {"groupName": table.GROUP_NAME})


def _found(by_name: dict[str, Any], path: str, where: str) -> tuple[Any, Any]:
    kind, name, *rest = path.split("/")
    try:
        if not rest:
            return by_name, f"{kind}/{name}"
        return source.find(by_name[f"{kind}/{name}"], "/".join(rest))
    except (KeyError, TypeError):
        raise SettingsError(f"hycluster/k8s/chart/table.py: {where}: {path}: there is no such path any more") from None


def _placed(spec: dict[str, Any], pods: str) -> None:
    """Let values say where a group's pods run."""
    for key, node in {
        "priorityClassName": When(f"{pods}.priorityClassName", Scalar(f"{pods}.priorityClassName")),
        "nodeSelector": IfAny(f"{pods}.nodeSelector"),
        "tolerations": IfAny(f"{pods}.tolerations"),
    }.items():
        if key in spec:
            raise SettingsError(f"{pods}: {key}: is in k8s/base already; hycluster/k8s/chart/make.py adds it")
        spec[key] = node


def _common(resource: dict[str, Any]) -> None:
    """What every resource, pod and container of ours gets."""
    metadata = resource["metadata"]
    if resource["kind"] == "Namespace":
        metadata["name"] = Scalar('include "hycluster.namespace" $')
    else:
        metadata["namespace"] = Scalar('include "hycluster.namespace" $')
    # Not on pods: a label that changes with the chart's version would make a new cluster.
    ours = {
        "helm.sh/chart": Scalar('include "hycluster.chart" $'),
        "app.kubernetes.io/instance": Scalar("$.Release.Name"),
        "app.kubernetes.io/managed-by": Scalar("$.Release.Service"),
    }
    metadata["labels"] = metadata.get("labels", {}) | ours
    for spec in _pod_specs(resource):
        spec["imagePullSecrets"] = IfAny('include "hycluster.pullSecrets" $ | fromYamlArray')
        for container in (source.through(one) for one in _containers(spec)):
            if container["image"].startswith("hycluster:"):
                container["image"] = Scalar('include "hycluster.image" $')
                container["imagePullPolicy"] = When("$.Values.image.pullPolicy", Scalar("$.Values.image.pullPolicy"))


def _pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    match node:
        case {"containers": list()}:
            yield node
        case dict():
            for value in list(node.values()):
                yield from _pod_specs(value)
        case list():
            for item in node:
                yield from _pod_specs(item)
        case When(_, then, otherwise):
            yield from _pod_specs(then)
            yield from _pod_specs(otherwise)
        case Each(_, item):
            yield from _pod_specs(item)


def _containers(spec: dict[str, Any]) -> list[Any]:
    return [*spec["containers"], *source.through(spec.get("initContainers", []))]


def _document(resource: When) -> str:
    if not resource.condition:
        return f"---\n{text(resource.then)}"
    return f"{{{{- if {resource.condition} }}}}\n---\n{text(resource.then)}{{{{- end }}}}\n"


def _constants(root: Path) -> str:
    """Numbers of the code's that the templates count with."""
    settings = {"models": [{"name": "m", "source": "m"}]}
    serve = serve_config(settings, "constants")
    serve["applications"][0]["args"] = {}
    (redis,) = (r for r in source.base(root / "k8s/base")["rayservice.yaml"])
    constants = {
        "listen": {door: {"host": "0.0.0.0", "port": port} for door, port in PORTS.items()},
        "doors": DOORS,
        "doorResources": DOOR_RESOURCES,
        "serve": serve,
        "redisAddress": redis["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"],
        "drainTimeoutSeconds": Settings.model_fields["drain_timeout_s"].default,
        **table.MARGINS,
        "group": values.group_defaults(),
    }
    dumped = json.dumps(constants, indent=2)
    return (
        f'{{{{- /* {MADE_BY} the code. */ -}}}}\n{{{{- define "hycluster.constants" -}}}}\n{dumped}\n{{{{- end -}}}}\n'
    )


def _about() -> str:
    about = {
        "apiVersion": "v2",
        "name": "hycluster",
        "description": "Serve large mixture-of-experts language models on Ray and vLLM, by KubeRay.",
        "type": "application",
        "version": __version__,
        "appVersion": __version__,
        "kubeVersion": ">=1.30.0-0",
    }
    return f"# {MADE_BY} hycluster's version.\n{text(about)}"
