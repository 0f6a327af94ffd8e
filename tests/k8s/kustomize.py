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


def with_components(folder: Path, components: Sequence[Path], scratch: Path) -> list[dict[str, Any]]:
    """The same with components on top, as a user's own kustomization would have them."""
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "hycluster",
        "resources": [os.path.relpath(folder, scratch)],
        "components": [os.path.relpath(component, scratch) for component in components],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return built(scratch)
