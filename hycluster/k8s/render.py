"""A deployment's settings for Kubernetes: those files of an overlay, or of a job, that nobody writes by hand.

An overlay has three: ``serve-config.yaml``, a patch of the RayService in ``k8s/base`` that carries, in
``serveConfigV2``, what KubeRay gives to Ray Serve: the application ``hycluster.app:build`` with the settings as
arguments; ``pods.yaml``, a patch with how many pods there are, how large they are and how they end; ``beside.yaml``,
resources that follow from them. A job's ``settings.yaml`` is a ConfigMap with the settings of its own engines. The
settings file in ``deployments/`` that they were made from is named in an annotation.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from hycluster.directory.starts import CONTROLLER_OPTIONS
from hycluster.errors import SettingsError
from hycluster.k8s.patches import beside, pods_patch
from hycluster.k8s.sizes import SHARE, deletion_delay_s, own_resource
from hycluster.settings.read import load_yaml, validate
from hycluster.settings.settings import Settings

APP_NAME = "hycluster"
# What pods share: an object store, or a volume. Helm's schema has it too, so no more than RE2 knows.
POD_STORE = r"^(s3://([^/@\s]+@)?[A-Za-z0-9]|/)"
IMPORT_PATH = "hycluster.app:build"
OVERLAY_MANIFEST = "serve-config.yaml"
PODS_PATCH = "pods.yaml"
BESIDE = "beside.yaml"
JOB_MANIFEST = "settings.yaml"
# Which settings a manifest was made from; `kubectl get rayservice hycluster -o yaml` shows it too.
ANNOTATION = "hycluster/settings"
PORTS = {"http": 8000, "grpc": 9000}
# Half of what each ingress pod has, so that an ingress process's successor finds room in any of them.
INGRESS_RESOURCES = {"ingress": 0.5}
# So that the Batch API's process is on an ingress pod, not on one with GPUs. Every ingress pod has one.
BATCHES_RESOURCES = {"batches": 1}
OPEN_AUTH = {"open": True}
INGRESS_REPLICAS = 2
# A pod each, also while one of the pods is not there yet, or not there any more.
INGRESS_REPLICAS_PER_POD = 1


def for_pods(settings: dict[str, Any], *, groups: bool = True) -> dict[str, Any]:
    """The settings, as a mapping, fitted to the base's pods.

    Ingress and replicas are in pods of their own, so all listen for other pods, and ingress processes are where the
    Service looks for them; where the settings have no callers asked who they are, they say so in words. There are two
    of them, if the settings do not say otherwise. The Batch API is closed where its store is the folder of one
    machine: in another pod it would be another folder. Several models have pods of their own each, which only their
    replicas fit.

    Args:
        groups: whether there are groups of pods by model; a job's cluster has one for all.
    """
    fitted = copy.deepcopy(settings)
    for ingress, port in PORTS.items():
        fitted[ingress] = (fitted.get(ingress) or {}) | {"host": "0.0.0.0", "port": port}
    # Network policies say who reaches the ingress pods.
    auth = fitted.get("auth") or {}
    if not (auth.get("enabled") or "open" in auth):
        fitted["auth"] = auth | OPEN_AUTH
    if "data_plane" in fitted:
        fitted["data_plane"] = {key: value for key, value in fitted["data_plane"].items() if key != "host"}
    chosen = {"replicas": INGRESS_REPLICAS, "replicas_per_node": INGRESS_REPLICAS_PER_POD} | (
        fitted.get("ingress") or {}
    )
    fitted["ingress"] = chosen | {"resources": dict(INGRESS_RESOURCES)}
    store = (fitted.get("batches") or {}).get("store")
    if store is None:
        fitted["batches"] = None
    else:
        fitted["batches"] = {**fitted["batches"], "resources": dict(BATCHES_RESOURCES)}
    if groups and len(fitted.get("models") or ()) > 1:
        for model in fitted["models"]:
            hardware = model.get("hardware") or {}
            own = (hardware.get("resources") or {}) | {own_resource(str(model.get("name"))): SHARE}
            model["hardware"] = hardware | {"resources": own}
    return {key: value for key, value in fitted.items() if value != {}}


def serve_config(settings: dict[str, Any], where: str, *, groups: bool = True) -> dict[str, Any]:
    """Ray Serve's settings (its ``ServeDeploySchema``) for a deployment's.

    Raises:
        SettingsError: the settings are wrong, or name a file that no pod has.
    """
    fitted = for_pods(settings, groups=groups)
    checked = validate(Settings, fitted, where)
    store = checked.batches.store if checked.batches else None
    if store and not re.match(POD_STORE, store):
        raise SettingsError(
            f"{where}: batches.store: {store!r} is below a working folder, which pods do not have; give s3://BUCKET/..."
            " or the absolute path of a volume that all ingress processes mount"
        )
    for model in checked.models:
        if model.source.startswith("."):
            raise SettingsError(
                f"{where}: models: {model.name}: source: {model.source!r} is below a working folder, which pods do not"
                " have; give an absolute path, a hub id or package:NAME"
            )
    return {
        # Callers come straight to the ingress. Serve's own proxies would listen on the same ports.
        "proxy_location": "Disabled",
        # What does not start is tried again for as long as it takes.
        "controller_options": CONTROLLER_OPTIONS,
        "applications": [
            {"name": APP_NAME, "route_prefix": None, "import_path": IMPORT_PATH, "args": fitted},
        ],
    }


def render_manifests(manifest: Path, settings_file: str, root: Path) -> dict[Path, str]:
    """The files of an overlay's or a job's folder, with their texts.

    Args:
        manifest: the one that carries the settings; :func:`manifest_in` tells its name.
        settings_file: as the annotation has it, relative to ``root``.

    Raises:
        SettingsError: the settings file is missing or wrong, or no pods can be made for it.
    """
    overlay = manifest.name == OVERLAY_MANIFEST
    config = serve_config(load_yaml(root / settings_file), settings_file, groups=overlay)
    arguments = config["applications"][0]["args"]
    header = f"# Made by 'hycluster k8s render' from {settings_file}: change it there, then render again.\n"
    if not overlay:
        made = _manifest("v1", "ConfigMap", f"{APP_NAME}-{manifest.parent.name}-settings", settings_file)
        made["data"] = {manifest.name: _Block(_dump(arguments))}
        return {manifest: header + _dump(made)}
    settings = validate(Settings, arguments, settings_file)
    made = _manifest("ray.io/v1", "RayService", APP_NAME, settings_file)
    made["spec"] = {
        "rayClusterDeletionDelaySeconds": deletion_delay_s(settings),
        "serveConfigV2": _Block(_dump(config)),
    }
    return {
        manifest: header + _dump(made),
        manifest.with_name(PODS_PATCH): header + _dump(pods_patch(settings)),
        manifest.with_name(BESIDE): header + "---\n".join(map(_dump, beside(settings, APP_NAME))),
    }


def unlisted(folder: Path) -> list[str]:
    """What an overlay's kustomization does not say of the files that are made for it; [] while there is none."""
    path = folder / "kustomization.yaml"
    if not path.is_file() or folder.resolve().parent.name == "jobs":
        return []
    kustomization = load_yaml(path)
    patches = [patch.get("path") for patch in kustomization.get("patches") or ()]
    missing = [f"patches: must list {name}" for name in (OVERLAY_MANIFEST, PODS_PATCH) if name not in patches]
    if BESIDE not in (kustomization.get("resources") or ()):
        missing.append(f"resources: must list {BESIDE}")
    return [f"{path}: {each}" for each in missing]


def manifest_in(folder: Path) -> Path:
    """Where the settings are in an overlay's or a job's folder."""
    return folder / (JOB_MANIFEST if folder.resolve().parent.name == "jobs" else OVERLAY_MANIFEST)


def manifests(root: Path) -> list[Path]:
    """All that there are.

    Raises:
        SettingsError: there are none here.
    """
    k8s = root / "k8s"
    found = [*k8s.glob(f"overlays/*/{OVERLAY_MANIFEST}"), *k8s.glob(f"jobs/*/{JOB_MANIFEST}")]
    if not found:
        raise SettingsError(f"{k8s}: no overlay here has a {OVERLAY_MANIFEST}; run this in the repository")
    return sorted(found)


def settings_of(manifest: Path) -> str:
    """Name of the settings file that a manifest was made from.

    Raises:
        SettingsError: the manifest is missing or does not say.
    """
    try:
        name = load_yaml(manifest)["metadata"]["annotations"][ANNOTATION]
    except (KeyError, TypeError):
        raise SettingsError(f"{manifest}: metadata.annotations: {ANNOTATION} must name the settings file") from None
    return str(name)


def _manifest(api_version: str, kind: str, name: str, settings_file: str) -> dict[str, Any]:
    metadata = {"name": name, "annotations": {ANNOTATION: settings_file}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


class _Block(str):
    """A text that YAML shows line by line."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def _dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
