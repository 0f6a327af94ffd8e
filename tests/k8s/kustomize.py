"""What ``kubectl apply -k`` would send."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hycluster.k8s import sources

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent for path in K8S.glob("overlays/*/kustomization.yaml"))
JOBS = sorted(path.parent for path in K8S.glob("jobs/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent for path in K8S.glob("components/*/kustomization.yaml"))


def built(folder: Path) -> list[dict[str, Any]]:
    """The manifests that a folder's kustomization makes."""
    return sources.built(folder)


def kustomization(
    folder: Path, base: Path, components: Sequence[Path] = (), extra: Sequence[str] = (), **own: Any
) -> None:
    """Write a user's own kustomization on top of one of ours."""
    lists = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "hycluster",
        "resources": [os.path.relpath(base, folder), *extra],
        "components": [os.path.relpath(component, folder) for component in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(lists | own))


def with_components(folder: Path, components: Sequence[Path], scratch: Path) -> list[dict[str, Any]]:
    """The manifests of a folder with components on top, as a user's own kustomization would have them."""
    kustomization(scratch, folder, components)
    return built(scratch)
