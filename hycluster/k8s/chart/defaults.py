"""Values from manifests: of the base for ``values.yaml``, of any overlay for those who change over to Helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hycluster.config import load_yaml
from hycluster.errors import SettingsError
from hycluster.k8s.chart import source
from hycluster.k8s.render import DOORS, manifest_in, render, settings_of

DEFAULT_OVERLAY = "k8s/overlays/dev"


def defaults(root: Path) -> dict[str, Any]:
    """The chart's own values: the dev overlay's."""
    resources = [resource for file in source.base(root / "k8s/base").values() for resource in file]
    folder = root / DEFAULT_OVERLAY
    (image,) = load_yaml(folder / "kustomization.yaml")["images"]
    manifest = manifest_in(folder)
    # Not what the file has now, which may be about to be written anew.
    patch = yaml.safe_load(render(manifest, settings_of(manifest), root))
    found = values_of([*resources, patch])
    found["image"]["tag"] = image["newTag"]
    return found


def values_of(resources: list[dict[str, Any]]) -> dict[str, Any]:
    """The values that make these manifests, as far as they are as the chart makes them.

    Args:
        resources: an overlay's, as kustomize builds it.

    Raises:
        SettingsError: there is no RayService of ours in them.
    """
    by_name: dict[str, Any] = {}
    for resource in resources:
        name = f"{resource['kind']}/{resource['metadata']['name']}"
        by_name[name] = _merged(by_name.get(name, {}), resource)
    try:
        spec = by_name["RayService/hycluster"]["spec"]
        return _values(by_name, spec, spec["rayClusterConfig"])
    except KeyError as error:
        raise SettingsError(f"manifests: {error.args[0]}: is missing; these are not hycluster's for serving") from None


def _values(by_name: dict[str, Any], spec: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    doors, *engines = cluster["workerGroupSpecs"]
    autoscaler = cluster["autoscalerOptions"]
    found: dict[str, Any] = {
        "image": _image(_main(doors)["image"]),
        "settings": _settings(spec["serveConfigV2"]),
        "head": _pods(cluster["headGroupSpec"]),
        "autoscaler": {
            "idleTimeoutSeconds": autoscaler["idleTimeoutSeconds"],
            "resources": autoscaler["resources"],
        },
        "doors": _pods(doors),
        "engines": [_group(group) for group in engines],
        "networkPolicies": {"clientNamespaces": _clients(by_name["NetworkPolicy/hycluster-doors"])},
        "disruptionBudgets": {
            part: by_name[budget]["spec"]["minAvailable"] if budget in by_name else 0
            for part, budget in (
                ("doors", "PodDisruptionBudget/hycluster-doors"),
                ("engines", "PodDisruptionBudget/hycluster-engines"),
            )
        },
    }
    if "PersistentVolumeClaim/hycluster-weights" in by_name:
        wanted = by_name["ConfigMap/hycluster-weights"]["data"]
        claim = by_name["PersistentVolumeClaim/hycluster-weights"]["spec"]
        found["weights"] = {
            "enabled": True,
            "repo": wanted["REPO"],
            "revision": wanted["REVISION"],
            "folder": wanted["FOLDER"],
            "size": claim["resources"]["requests"]["storage"],
        }
    if "HTTPRoute/hycluster" in by_name:
        found["gateway"] = {"enabled": True}
    if "ServiceMonitor/hycluster-doors" in by_name:
        found["metrics"] = {"enabled": True}
    if "ray.io/gang-scheduling-enabled" in by_name["RayService/hycluster"]["metadata"].get("labels", {}):
        found["gangScheduling"] = True
    return found


def _main(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return container


def _image(image: str) -> dict[str, str]:
    name, _, digest = image.partition("@")
    path, colon, tag = name.rpartition(":")
    return {"repository": path, "tag": tag} | ({"digest": digest} if digest else {}) if colon else {"repository": name}


def _settings(serve_config: str) -> dict[str, Any]:
    """As in ``deployments/``: without what the chart fits to the pods itself."""
    settings: dict[str, Any] = yaml.safe_load(serve_config)["applications"][0]["args"]
    for door in ("http", "grpc"):
        settings[door] = {key: value for key, value in settings[door].items() if key not in ("host", "port")}
    settings.pop("door_resources")
    if settings["doors"] == DOORS:
        del settings["doors"]
    if settings["batches"] is None:
        del settings["batches"]
    return {key: value for key, value in settings.items() if value != {}}


def _pods(group: dict[str, Any]) -> dict[str, Any]:
    spec = group["template"]["spec"]
    optional = {key: spec[key] for key in ("nodeSelector", "tolerations", "priorityClassName") if key in spec}
    return {"resources": _main(group)["resources"]} | optional


def _group(group: dict[str, Any]) -> dict[str, Any]:
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    types = [name.partition(":")[2] for name in group.get("resources", {}) if name.startswith("accelerator_type:")]
    return {
        "name": group["groupName"],
        "minReplicas": group["minReplicas"],
        "maxReplicas": group["maxReplicas"],
        "hosts": group.get("numOfHosts", 1),
        **({"accelerator": types[0]} if types else {}),
        **_pods(group),
        "sharedMemory": volumes["shared-mem"]["emptyDir"]["sizeLimit"],
    }


def _clients(policy: dict[str, Any]) -> dict[str, str]:
    (labels,) = (
        peer["namespaceSelector"]["matchLabels"]
        for peer in policy["spec"]["ingress"][0]["from"]
        if "namespaceSelector" in peer
    )
    return dict(labels)


def _merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: _merged(old.get(key), value) for key, value in new.items()}
    return new
