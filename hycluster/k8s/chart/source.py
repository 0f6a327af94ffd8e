"""What kustomize would read: a base's manifests, and the components' patches with a condition on each.

Only as much of kustomize as ``k8s/base`` and ``k8s/components`` use; what else they may come to use is an error. A test
holds the chart against what the real kustomize builds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hycluster.errors import SettingsError
from hycluster.k8s.chart.nodes import GONE, When

Manifest = dict[str, Any]
Files = dict[str, list[Manifest]]
# Beside resources and patches. Images are a value; name-references is for kustomize's own transformers.
KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches", "images", "components", "configMapGenerator"}
GENERATED = "config-map.yaml"
HERE = "true"


def base(folder: Path) -> Files:
    """The manifests of a folder by the file that they are in, as its kustomization lists them."""
    kustomization = read_kustomization(folder)
    if surplus := kustomization.keys() & {"patches", "images", "configMapGenerator"}:
        raise SettingsError(f"{folder}: kustomization.yaml: {sorted(surplus)}: the chart's base has none")
    return {name: _documents(folder / name) for name in kustomization["resources"]}


def add_component(manifests: Files, folder: Path, condition: str) -> Files:
    """Put a component's patches into manifests, each to be there if the condition holds.

    Its images are left out: what image it is, the values say.

    Args:
        condition: a template's pipeline; ``HERE`` patches once and for all.

    Returns:
        The component's own manifests, by file.

    Raises:
        SettingsError: the component has what can't be put into a template, or patches what is not there.
    """
    kustomization = read_kustomization(folder)
    for patch in kustomization.get("patches", ()):
        for target, operations in _aimed(manifests, patch, folder):
            for operation in operations:
                _apply(target, _copied(operation), condition, folder)
    found = {name: _documents(folder / name) for name in kustomization.get("resources", ()) if name.endswith(".yaml")}
    generated = [_config_map(one, folder) for one in kustomization.get("configMapGenerator", ())]
    return found | ({GENERATED: generated} if generated else {})


def patched(manifest: Manifest, operations: list[dict[str, Any]], where: Path) -> Manifest:
    """A copy with a JSON patch applied."""
    made: Manifest = _copied(manifest)
    for operation in operations:
        _apply(made, _copied(operation), HERE, where)
    return made


def find_node(node: Any, path: str) -> tuple[Any, Any]:
    """The mapping or list that holds what is at a path, and its key there.

    The path's steps are keys (``~1`` for a slash within one); in a list, the ``name`` or ``groupName`` of an item, or
    a number. They lead through what is there on a condition only.

    Raises:
        KeyError: there is nothing at that path.
    """
    *parents, last = (step.replace("~1", "/") for step in path.split("/"))
    for step in parents:
        node = through(node)
        node = node[_index(node, step)]
    node = through(node)
    key = _index(node, last)
    if isinstance(node, dict) and key not in node:
        raise KeyError(key)
    return node, key


def through(node: Any) -> Any:
    while isinstance(node, When):
        node = node.then
    return node


def _index(node: Any, step: str) -> Any:
    if isinstance(node, dict):
        return step
    if isinstance(node, list):
        for index, item in enumerate(map(through, node)):
            if isinstance(item, dict) and step in (item.get("name"), item.get("groupName")):
                return index
        if step.isdecimal() and int(step) < len(node):
            return int(step)
    raise KeyError(step)


def _apply(target: Manifest, operation: dict[str, Any], condition: str, folder: Path) -> None:
    """One operation of a JSON patch; ``add`` to a list adds at its end."""
    kind, path = operation["op"], operation["path"]
    try:
        node, key = _place(target, path)
        if kind == "copy":
            source, at = _place(target, operation["from"])
            operation["value"], kind = _copied(source[at]), "add"
        if kind == "test":
            if through(node[key]) != operation["value"]:
                raise SettingsError(f"{folder}: patches: {path}: is not {operation['value']!r}")
        elif kind == "add" and isinstance(node, list) and key in ("-", len(node)):
            node.append(_on(condition, operation["value"]))
        elif kind == "add" and isinstance(node, dict) and key not in node:
            node[key] = _on(condition, operation["value"])
        elif kind == "replace" or (kind == "add" and isinstance(node, dict)):
            node[key] = _on(condition, operation["value"], node[key])
        elif kind == "remove" and condition != HERE:
            node[key] = When(f"not ({condition})", node[key])
        else:
            raise SettingsError(f"{folder}: patches: {kind} {path}: can't be put into a template")
    except (KeyError, IndexError, TypeError):
        raise SettingsError(f"{folder}: patches: {kind} {path}: there is no such path") from None


def _place(target: Any, path: str) -> tuple[Any, Any]:
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/"))
    node = target
    for part in parents:
        node = through(node[int(part)] if isinstance(node, list) else node[part])
    return node, int(last) if isinstance(node, list) and last != "-" else last


def _on(condition: str, value: Any, otherwise: Any = GONE) -> Any:
    return value if condition == HERE else When(condition, value, otherwise)


def _aimed(manifests: Files, patch: dict[str, Any], folder: Path) -> Iterator[tuple[Manifest, list[dict[str, Any]]]]:
    """The manifests that a patch is for, with its operations. Kinds that are not there at all are jobs'."""
    content = yaml.safe_load(patch["patch"])
    if isinstance(content, dict):
        target = {"kind": content["kind"], "name": content["metadata"]["name"]}
        operations = list(_merging({key: content[key] for key in content if key not in ("apiVersion", "kind")}, ""))
    else:
        target, operations = patch["target"], content
    found = list(_targets(manifests, target))
    if not found and "RayService" in target["kind"]:
        raise SettingsError(f"{folder}: patches: {target}: there is no such manifest")
    yield from ((manifest, operations) for manifest in found)


def _merging(content: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """A strategic merge patch of mappings as a JSON patch."""
    for key, value in content.items():
        below = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
        if isinstance(value, dict) and key in ("metadata", "annotations", "labels", "spec"):
            yield from _merging(value, below)
        elif below != "/metadata/name":
            yield {"op": "add", "path": below, "value": value}


def _targets(manifests: Files, target: dict[str, str]) -> Iterator[Manifest]:
    for manifest in (one for file in manifests.values() for one in file):
        names = {"kind": manifest["kind"], "name": manifest["metadata"]["name"]}
        if all(re.fullmatch(f"(?:{wanted})", names[key]) for key, wanted in target.items()):
            yield manifest


def _config_map(generator: dict[str, Any], folder: Path) -> Manifest:
    if generator.keys() - {"name", "options", "literals"} or not generator["options"].get("disableNameSuffixHash"):
        raise SettingsError(f"{folder}: configMapGenerator: must have literals, and no suffix to its name")
    data = dict(literal.split("=", 1) for literal in generator["literals"])
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def read_kustomization(folder: Path) -> dict[str, Any]:
    """A folder's kustomization."""
    file = folder / "kustomization.yaml"
    try:
        found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{file}: no such file; run this in the repository") from None
    if surplus := found.keys() - KNOWN:
        raise SettingsError(f"{file}: {sorted(surplus)}: the chart can't be made from it")
    if [name for name in found.get("components", ()) if Path(name).name != "name-references"]:
        raise SettingsError(f"{file}: components: only name-references can be within what the chart is made from")
    return found


def _documents(file: Path) -> list[Manifest]:
    return [_copied(one) for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one]


def _copied(value: Any) -> Any:
    """Without shared parts: YAML's aliases are one object in several places."""
    return json.loads(json.dumps(value))
