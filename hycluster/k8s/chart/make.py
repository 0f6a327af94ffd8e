"""The chart's files, as text: templates from ``k8s/base`` and ``k8s/components``, values, schema, README."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hycluster import __version__
from hycluster.errors import SettingsError
from hycluster.k8s import sizes
from hycluster.k8s.chart import source, table, values
from hycluster.k8s.chart.defaults import defaults
from hycluster.k8s.chart.describe import readme, values_yaml
from hycluster.k8s.chart.ingress import ingresses
from hycluster.k8s.chart.nodes import Each, IfAny, Scalar, When, text
from hycluster.k8s.patches import GPU, beside
from hycluster.k8s.render import (
    APP_NAME,
    BATCHES_RESOURCES,
    INGRESS_REPLICAS,
    INGRESS_REPLICAS_PER_POD,
    INGRESS_RESOURCES,
    OPEN_AUTH,
    PORTS,
    serve_config,
)
from hycluster.settings.settings import Settings

CHART = Path("k8s/chart")
# Beside these, which are made, the folder has what is written by hand.
BY_HAND = {"templates/_helpers.tpl", "templates/_checks.tpl", "templates/_groups.tpl", "templates/NOTES.txt"}
MADE_BY = "Made by 'hycluster k8s render' from"
TABLE = "hycluster/k8s/chart/table.py"
# Of a model on CPU with a store, from which the manifests come that overlays have beside the base's.
SAMPLE = {
    "models": [{"name": "m", "source": "m"}],
    "ingress": {"replicas": INGRESS_REPLICAS},
    "batches": {"store": "s3://bucket"},
}


def made(root: Path) -> dict[str, str]:
    """Every file that is made, by its name in the chart's folder.

    Raises:
        SettingsError: the manifests are not as the chart's table expects them.
    """
    files = {
        "Chart.yaml": _about(),
        "values.yaml": values_yaml(defaults(root)),
        "values.schema.json": json.dumps(values.values_schema(), indent=1, ensure_ascii=False) + "\n",
        "README.md": readme(),
        "templates/_constants.tpl": _constants(),
    }
    for name, (origin, resources) in _manifests(root / "k8s").items():
        files[f"templates/{name}"] = f"{{{{- /* {MADE_BY} {origin}. */ -}}}}\n" + "".join(map(_document, resources))
    files["templates/rayservice.yaml"] = '{{- include "hycluster.checks" $ -}}\n' + files["templates/rayservice.yaml"]
    return files


def chart_files(root: Path) -> dict[Path, str]:
    """As :func:`made`, by path."""
    return {root / CHART / name: content for name, content in made(root).items()}


def surplus(root: Path, wanted: Collection[Path]) -> list[Path]:
    """Files in the chart that are neither made nor written by hand: what made them is gone."""
    known = {root / CHART / name for name in BY_HAND}.union(wanted)
    return sorted(file for file in (root / CHART).rglob("*") if file.is_file() and file not in known)


def _manifests(k8s: Path) -> dict[str, tuple[str, list[When | Each]]]:
    """Resources with the values' expressions in them, by template; with the file that they come from."""
    cluster = source.base(k8s / "cluster")
    for name, condition in table.CLUSTER_PATCHES.items():
        source.add_component(cluster, k8s / name, condition)
    parts = source.base(k8s / "base")
    origins = {
        name: f"k8s/{folder}/{name}" for folder, files in (("base", parts), ("cluster", cluster)) for name in files
    }
    conditions: dict[str, str] = {}
    for folder in sorted(path.parent for path in (k8s / "components").glob("*/kustomization.yaml")):
        if folder.name not in table.COMPONENTS:
            raise SettingsError(f"{folder}: {TABLE}: COMPONENTS: must say what the chart does with it")
        switch = table.COMPONENTS[folder.name]
        if switch is None:
            continue
        for file, resources in source.add_component(parts, folder, switch).items():
            cluster[f"{folder.name}-{file}"] = resources
            origins[f"{folder.name}-{file}"] = f"k8s/components/{folder.name}/{file}"
            conditions |= {_name(resource): switch for resource in resources}
    others = {
        "beside.yaml": beside(Settings.model_validate(SAMPLE), APP_NAME),
        "ingress.yaml": ingresses(cluster["gateway-routes-routes.yaml"], cluster["gateway-routes-network-policy.yaml"]),
        "weights.yaml": [copy.deepcopy(table.WEIGHTS)],
    }
    origins |= {
        "beside.yaml": "hycluster/k8s/patches.py",
        "ingress.yaml": "k8s/components/gateway-routes",
        "weights.yaml": TABLE,
    }
    parts = cluster | parts | others
    by_name = {_name(resource): resource for resources in parts.values() for resource in resources}
    names = {id(resource): name for name, resource in by_name.items()}
    _fill(by_name)
    for resource in by_name.values():
        _common(resource)
    conditions |= table.RESOURCES | table.PER_GROUP
    if unknown := conditions.keys() - by_name.keys():
        raise SettingsError(f"{TABLE}: RESOURCES, PER_GROUP: {sorted(unknown)}: there is no such manifest")
    return {
        file: (origins[file], [_conditional(names[id(r)], r, conditions) for r in resources])
        for file, resources in parts.items()
    }


def _name(resource: dict[str, Any]) -> str:
    return f"{resource['kind']}/{resource['metadata']['name']}"


def _conditional(name: str, resource: dict[str, Any], conditions: dict[str, str]) -> When | Each:
    made = When(conditions.get(name, ""), resource)
    return Each(table.EACH_GROUP, made) if name in table.PER_GROUP else made


def _fill(by_name: dict[str, Any]) -> None:
    for path, node in table.REPLACED.items():
        parent, key = _found(by_name, path, "REPLACED")
        parent[key] = node(parent[key]) if callable(node) else copy.deepcopy(node)
    for path, node in table.ADDED.items():
        above, _, key = path.rpartition("/")
        holder, last = _found(by_name, above, "ADDED")
        parent = source.through(holder[last])
        key = key.replace("~1", "/")
        if key in parent:
            raise SettingsError(f"{TABLE}: ADDED: {path}: is there already")
        parent[key] = copy.deepcopy(node)
    for path, pods in table.PODS.items():
        holder, last = _found(by_name, f"{path}/template/spec", "PODS")
        _placed(holder[last], pods)
    # Last: from here on the group has no name to find it by.
    groups, key = _found(by_name, table.GROUP, "GROUP")
    groups[key] = Each(table.EACH_GROUP, groups[key] | {"groupName": table.GROUP_NAME})


def _found(by_name: dict[str, Any], path: str, where: str) -> tuple[Any, Any]:
    kind, name, *rest = path.split("/")
    try:
        if not rest:
            return by_name, f"{kind}/{name}"
        return source.find_node(by_name[f"{kind}/{name}"], "/".join(rest))
    except (KeyError, TypeError):
        raise SettingsError(f"{TABLE}: {where}: {path}: there is no such path any more") from None


def _placed(spec: dict[str, Any], pods: str) -> None:
    """Let values say where a group's pods run, and what they are worth."""
    spec["priorityClassName"] = When(f"{pods}.priorityClassName", Scalar(f"{pods}.priorityClassName"))
    for key in ("nodeSelector", "tolerations"):
        if key in spec:
            raise SettingsError(f"{pods}: {key}: is in k8s/base; hycluster/k8s/chart must take it into the defaults")
        spec[key] = IfAny(f"{pods}.{key}")


def _common(resource: dict[str, Any]) -> None:
    """What every resource, pod and container of ours gets."""
    metadata = resource["metadata"]
    if resource["kind"] == "Namespace":
        metadata["name"] = Scalar('include "hycluster.namespace" $')
    elif resource["kind"] != "PriorityClass":
        metadata["namespace"] = Scalar('include "hycluster.namespace" $')
    # Not on pods: a label that changes with the chart's version would make a new cluster.
    labels = metadata.get("labels", {}) | {
        "helm.sh/chart": Scalar('include "hycluster.chart" $'),
        "app.kubernetes.io/instance": Scalar("$.Release.Name"),
        "app.kubernetes.io/managed-by": Scalar("$.Release.Service"),
    }
    if resource["kind"] in table.MONITORS:
        labels[IfAny(table.MONITORS[resource["kind"]])] = None
    metadata["labels"] = labels
    for spec in _pod_specs(resource):
        spec["imagePullSecrets"] = IfAny('include "hycluster.pullSecrets" $ | fromYamlArray')
        for container in (source.through(one) for one in _containers(spec)):
            image = container["image"]
            if isinstance(image, str) and image.startswith("hycluster:"):
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


def _document(resource: When | Each) -> str:
    if isinstance(resource, Each):
        return f"{{{{- range {resource.over} }}}}\n{_document(resource.item)}{{{{- end }}}}\n"
    if not resource.condition:
        return f"---\n{text(resource.then)}"
    return f"{{{{- if {resource.condition} }}}}\n---\n{text(resource.then)}{{{{- end }}}}\n"


def _constants() -> str:
    """Numbers of the code's that the templates count with."""
    serve = serve_config(SAMPLE, "constants")
    serve["applications"][0]["args"] = {}
    constants = {
        "listen": {ingress: {"host": "0.0.0.0", "port": port} for ingress, port in PORTS.items()},
        "openAuth": OPEN_AUTH,
        "ingressReplicas": INGRESS_REPLICAS,
        "ingressResources": INGRESS_RESOURCES,
        "ingressReplicasPerPod": INGRESS_REPLICAS_PER_POD,
        "batchesResources": BATCHES_RESOURCES,
        "serve": serve,
        "drainTimeoutSeconds": Settings.model_fields["drain_timeout_s"].default,
        "drainMarginSeconds": sizes.SERVE_MARGIN_S + sizes.RAY_MARGIN_S,
        "graceMarginSeconds": sizes.PRE_STOP_S + sizes.STOP_MARGIN_S,
        "deletionMarginSeconds": sizes.SERVE_MARGIN_S,
        "share": sizes.SHARE,
        "gpu": GPU,
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
