"""A deployment's settings for Kubernetes: the one file of an overlay, or of a job, that nobody writes by hand.

An overlay's ``serve-config.yaml`` is a patch of the RayService in ``k8s/base``. It carries, in ``serveConfigV2``, what
KubeRay gives to Ray Serve: the application ``hycluster.app:build`` with the settings as arguments. A job's
``settings.yaml`` is a ConfigMap with the settings of its own engines. Both name the file in ``deployments/`` that they
were made from in an annotation, and are fitted to the pods in ``k8s/``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from hycluster.config import Settings, load_yaml, validate
from hycluster.errors import SettingsError

APP_NAME = "hycluster"
IMPORT_PATH = "hycluster.app:build"
OVERLAY_MANIFEST = "serve-config.yaml"
JOB_MANIFEST = "settings.yaml"
# Which settings a manifest was made from; `kubectl get rayservice hycluster -o yaml` shows it too.
ANNOTATION = "hycluster/settings"
PORTS = {"http": 8000, "grpc": 9000}
# Half of what each door pod has, so that a door's successor finds room in any of them.
DOOR_RESOURCES = {"door": 0.5}
DOORS = 2
# A pod each, also while one of the pods is not there yet, or not there any more.
DOORS_PER_POD = 1


def for_pods(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, as a mapping, fitted to the base's pods.

    Doors and replicas are in pods of their own, so all listen for other pods, and doors are where the Service looks
    for them. There are two of them, if the settings do not say otherwise. The Batch API is closed where its
    store is the folder of one machine: in another pod it would be another folder.
    """
    fitted = copy.deepcopy(settings)
    for door, port in PORTS.items():
        fitted[door] = (fitted.get(door) or {}) | {"host": "0.0.0.0", "port": port}
    if "data_plane" in fitted:
        fitted["data_plane"] = {key: value for key, value in fitted["data_plane"].items() if key != "host"}
    fitted.setdefault("doors", DOORS)
    fitted["door_resources"] = dict(DOOR_RESOURCES)
    fitted.setdefault("doors_per_node", DOORS_PER_POD)
    store = (fitted.get("batches") or {}).get("store")
    if store is None:
        fitted["batches"] = None
    return {key: value for key, value in fitted.items() if value != {}}


def serve_config(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Ray Serve's settings (its ``ServeDeploySchema``) for a deployment's.

    Raises:
        SettingsError: the settings are wrong, or name a file that no pod has.
    """
    fitted = for_pods(settings)
    for model in validate(Settings, fitted, where).models:
        if model.source.startswith("."):
            raise SettingsError(
                f"{where}: models: {model.name}: source: {model.source!r} is below a working folder, which pods do not"
                " have; give an absolute path, a hub id or package:NAME"
            )
    return {
        # Callers come straight to the doors. Serve's own proxies would listen on the same ports.
        "proxy_location": "Disabled",
        "applications": [
            {"name": APP_NAME, "route_prefix": None, "import_path": IMPORT_PATH, "args": fitted},
        ],
    }


def render(manifest: Path, settings_file: str, root: Path) -> str:
    """The text of an overlay's or a job's manifest.

    Args:
        manifest: the file it is for; :func:`manifest_in` tells its name.
        settings_file: as the annotation has it, relative to ``root``.

    Raises:
        SettingsError: the settings file is missing or wrong.
    """
    settings = load_yaml(root / settings_file)
    config = serve_config(settings, settings_file)
    made: dict[str, Any]
    if manifest.name == OVERLAY_MANIFEST:
        made = _manifest("ray.io/v1", "RayService", APP_NAME, settings_file)
        made["spec"] = {"serveConfigV2": _Block(_dump(config))}
    else:
        made = _manifest("v1", "ConfigMap", f"{APP_NAME}-{manifest.parent.name}-settings", settings_file)
        made["data"] = {manifest.name: _Block(_dump(config["applications"][0]["args"]))}
    return f"# Made by 'hycluster k8s render' from {settings_file}: change it there, then render again.\n{_dump(made)}"


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
    pass


_Dumper.add_representer(_Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def _dump(data: dict[str, Any]) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
