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
from hycluster.k8s.chart.nodes import When

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches", "images"}


def base(folder: Path) -> dict[str, list[Manifest]]:
    """The manifests of a folder by the file that they are in, as its kustomization lists them."""
    kustomization = _kustomization(folder)
    if surplus := kustomization.keys() & {"patches", "images"}:
        raise SettingsError(f"{folder}: kustomization.yaml: {sorted(surplus)}: the chart's base has none")
    return {name: _documents(folder / name) for name in kustomization["resources"]}


def add_component(manifests: dict[str, list[Manifest]], folder: Path, condition: str) -> dict[str, list[Manifest]]:
    """Put a component's patches into manifests, each to be there if the condition holds.

    Its images are left out: what image it is, the values say.

    Returns:
        The component's own manifests, by file.

    Raises:
        SettingsError: the component has what can't be put into a template, or patches what is not there.
    """
    kustomization = _kustomization(folder)
    for patch in kustomization.get("patches", ()):
        operations = _copied(yaml.safe_load(patch["patch"]))
        targets = list(_targets(manifests, patch["target"]))
        if not targets:
            raise SettingsError(f"{folder}: patches: {patch['target']}: there is no such manifest")
        if not isinstance(operations, list):
            raise SettingsError(f"{folder}: patches: must be JSON patches (a list of operations)")
        for target in targets:
            for operation in operations:
                _apply(target, _copied(operation), condition, folder)
    return {name: _documents(folder / name) for name in kustomization.get("resources", ())}


def find(node: Any, path: str) -> tuple[Any, Any]:
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
    kind, path = operation["op"], operation["path"]
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/"))
    node: Any = target
    try:
        for part in parents:
            node = through(node[int(part)] if isinstance(node, list) else node[part])
        if kind == "add" and last == "-":
            node.append(When(condition, operation["value"]))
            return
        key = int(last) if isinstance(node, list) else last
        if kind == "add" and isinstance(node, dict) and key not in node:
            node[key] = When(condition, operation["value"])
        elif kind in ("add", "replace") and not (kind == "add" and isinstance(node, list)):
            node[key] = When(condition, operation["value"], node[key])
        elif kind == "remove":
            node[key] = When(f"not ({condition})", node[key])
        else:
            raise SettingsError(f"{folder}: patches: {kind} {path}: can't be put into a template")
    except (KeyError, IndexError, TypeError):
        raise SettingsError(f"{folder}: patches: {kind} {path}: there is no such path") from None


def _targets(manifests: dict[str, list[Manifest]], target: dict[str, str]) -> Iterator[Manifest]:
    for manifest in (one for file in manifests.values() for one in file):
        names = {"kind": manifest["kind"], "name": manifest["metadata"]["name"]}
        if all(re.fullmatch(f"(?:{wanted})", names[key]) for key, wanted in target.items()):
            yield manifest


def _kustomization(folder: Path) -> dict[str, Any]:
    file = folder / "kustomization.yaml"
    try:
        read: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{file}: no such file; run this in the repository") from None
    if surplus := read.keys() - KNOWN:
        raise SettingsError(f"{file}: {sorted(surplus)}: the chart can't be made from it")
    return read


def _documents(file: Path) -> list[Manifest]:
    return [_copied(one) for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one]


def _copied(value: Any) -> Any:
    """Without shared parts: YAML's aliases are one object in several places."""
    return json.loads(json.dumps(value))
