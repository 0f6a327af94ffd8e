"""What of an overlay's pods has no value in the chart, for who changes over to Helm: containers' variables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hycluster.errors import SettingsError
from hycluster.k8s.pods import pods_of
from hycluster.k8s.rules.drain import DRAIN

# Computed from the values.
COMPUTED = {DRAIN, "HYCLUSTER_REDIS"}


def left_behind(resources: list[dict[str, Any]], root: Path) -> list[str]:
    """Variables that pods have here and the chart's pods have not, or otherwise: a line each.

    Args:
        root: the repository, whose base and components are what the chart is made of.

    Raises:
        SettingsError: this is not the repository.
    """
    files = [root / "k8s/base/rayservice.yaml", *sorted(root.glob("k8s/components/*/kustomization.yaml"))]
    if not files[0].is_file():
        raise SettingsError(f"{files[0]}: no such file; run this in the repository")
    usual = {entry for file in files for entry in _variables(yaml.safe_load(file.read_text(encoding="utf-8")))}
    found = []
    for pod in (pod for resource in resources if resource["kind"] == "RayService" for pod in pods_of(resource)):
        for path, container in pod.containers:
            for entry in container.get("env") or ():
                name, value = entry["name"], entry.get("value")
                if name not in COMPUTED and (name, value) not in usual:
                    shown = f"={value}" if value is not None else ""
                    found.append(f"{pod.owner}: {pod.path}.{path}.env: {name}{shown}")
    return found


def _variables(node: Any) -> Iterator[tuple[str, str | None]]:
    """Of all containers, also of those in a kustomization's patches."""
    if isinstance(node, dict):
        if isinstance(node.get("patch"), str):
            yield from _variables(yaml.safe_load(node["patch"]))
        if "name" in node and node.keys() & {"value", "valueFrom"} and isinstance(node["name"], str):
            yield node["name"], node.get("value")
        for child in node.values():
            yield from _variables(child)
    elif isinstance(node, list):
        for child in node:
            yield from _variables(child)
