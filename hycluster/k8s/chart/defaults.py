"""Values from manifests: of the base for ``values.yaml``, of settings, of an overlay for who changes over to Helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hycluster import __version__
from hycluster.errors import SettingsError
from hycluster.k8s.chart import source
from hycluster.k8s.patches import beside, pods_patch
from hycluster.k8s.render import APP_NAME, INGRESS_REPLICAS, OPEN_AUTH, manifest_in, serve_config, settings_of
from hycluster.settings.read import load_yaml, validate
from hycluster.settings.settings import Settings

DEFAULT_OVERLAY = Path("k8s/overlays/dev")
RDMA = "rdma"


def defaults(root: Path) -> dict[str, Any]:
    """The chart's own values: the dev overlay's, and the components' where they have more to say."""
    found = _from_settings(settings_of(manifest_in(root / DEFAULT_OVERLAY)), root)
    routes = source.add_component({}, root / "k8s/components/gateway-routes", "")["routes.yaml"]
    found["gateway"] = {"authFilter": routes[0]["spec"]["rules"][0]["filters"][0]["extensionRef"]}
    (fabric,) = source.read_kustomization(root / "k8s/components" / RDMA)["configMapGenerator"]
    k8s = root / "k8s"
    (keys,) = source.add_component(source.base(k8s / "base"), k8s / "components/keys-database", "")[
        "network-policy.yaml"
    ]
    found["keysDatabase"] = {"cidrs": _cidrs(keys)}
    # As private as the API server's, until it is known better.
    found["redis"]["cidrs"] = found["networkPolicies"]["apiServerCidrs"]
    found[RDMA] = {"environment": dict(literal.split("=", 1) for literal in fabric["literals"])}
    return found


def for_settings(settings_file: str, root: Path) -> dict[str, Any]:
    """The values that differ from the chart's own, for settings."""
    return _beyond(_from_settings(settings_file, root), defaults(root))


def _beyond(found: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What is not the default. Settings stay whole: whoever reads them must not have to know the default's."""
    made: dict[str, Any] = {}
    for key, value in found.items():
        usual = default.get(key)
        if isinstance(value, dict) and isinstance(usual, dict) and key != "settings":
            value = _beyond(value, usual)  # noqa: PLW2901
            if value:
                made[key] = value
        elif value != usual:
            made[key] = value
    return made


def _from_settings(settings_file: str, root: Path) -> dict[str, Any]:
    """What an overlay of these settings would be made of: the base, the component ``gpu`` if need be, and patches."""
    k8s = root / "k8s"
    config = serve_config(load_yaml(root / settings_file), settings_file)
    settings = validate(Settings, config["applications"][0]["args"], settings_file)
    gpu = any(model.hardware.accelerator and model.simulated is None for model in settings.models)
    files = source.base(k8s / "base")
    if gpu:
        source.add_component(files, k8s / "components/gpu", source.HERE)
    resources = [resource for file in files.values() for resource in file]
    service = next(resource for resource in resources if resource["kind"] == "RayService")
    patched = source.patched(service, pods_patch(settings), Path(settings_file))
    patched["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    found = values_of([*(r for r in resources if r is not service), patched, *beside(settings, APP_NAME)])
    found["image"]["tag"] = f"{__version__}-{'gpu' if gpu else 'cpu'}"
    # Which repository a folder is from, nobody can tell from the settings: the chart asks for it.
    of_hub = [model.source for model in settings.models if not model.source.startswith("package:")]
    if len(set(of_hub)) == 1:
        folder = of_hub[0].removeprefix("/models/") if of_hub[0].startswith("/models/") else ""
        found["weights"] = {"enabled": True, "repo": "" if folder else of_hub[0], "folder": folder}
    elif of_hub:
        found["hubEgress"] = True
    return found


def values_of(resources: list[dict[str, Any]]) -> dict[str, Any]:
    """The values that make these manifests, as far as they are as the chart makes them.

    Args:
        resources: an overlay's, as kustomize builds it.

    Raises:
        SettingsError: these are not hycluster's for serving.
    """
    by_name = {f"{resource['kind']}/{resource['metadata']['name']}": resource for resource in resources}
    services = [name for name in by_name if name.startswith("RayService/")]
    if services and f"RayService/{APP_NAME}" not in services:
        raise SettingsError(
            f"manifests: {', '.join(services)}: must be RayService/{APP_NAME}; the chart's names are fixed, so leave"
            " namePrefix and nameSuffix out: one release a namespace"
        )
    try:
        spec = by_name["RayService/hycluster"]["spec"]
        return _values(by_name, spec, spec["rayClusterConfig"])
    except KeyError as error:
        raise SettingsError(f"manifests: {error.args[0]}: is missing; these are not hycluster's for serving") from None


def _values(by_name: dict[str, Any], spec: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    ingresses, *engines = cluster["workerGroupSpecs"]
    autoscaler = cluster["autoscalerOptions"]
    found: dict[str, Any] = {
        "image": _image(_main(ingresses)["image"]),
        "settings": _settings(spec["serveConfigV2"]),
        "head": _pods(cluster["headGroupSpec"]),
        "autoscaler": {key: autoscaler[key] for key in ("idleTimeoutSeconds", "resources")},
        "ingressPods": _pods(ingresses),
        "engines": [_group(group) for group in engines],
        "redis": _redis(by_name, cluster),
        "networkPolicies": {
            "clients": _clients(by_name["NetworkPolicy/hycluster-ingress"]),
            "apiServerCidrs": _cidrs(by_name["NetworkPolicy/hycluster-head"]),
        },
    }
    if secrets := ingresses["template"]["spec"].get("imagePullSecrets"):
        found["imagePullSecrets"] = [secret["name"] for secret in secrets]
    if "PersistentVolumeClaim/hycluster-weights" in by_name:
        found["weights"] = _weights(by_name)
    if (policy := by_name.get("NetworkPolicy/hycluster-keys-database")) is not None:
        found["keysDatabase"] = _keys_database(policy, ingresses)
    if "ConfigMap/hycluster-nccl" in by_name:
        found[RDMA] = _rdma(by_name["ConfigMap/hycluster-nccl"], engines[0])
        for group in found["engines"]:
            for bound in group["resources"].values():
                bound.pop(found[RDMA]["resource"], None)
    switches: dict[str, dict[str, Any]] = {
        "HTTPRoute/hycluster": {"gateway": {"enabled": True}},
        "ServiceMonitor/hycluster-ingress": {"metrics": {"enabled": True}},
        "NetworkPolicy/hycluster-hub": {"hubEgress": True},
    }
    for name, value in switches.items():
        found |= value if name in by_name else {}
    if "ray.io/gang-scheduling-enabled" in by_name["RayService/hycluster"]["metadata"].get("labels", {}):
        found["gangScheduling"] = True
    return found


def _main(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return container


def _image(image: str) -> dict[str, str]:
    name, _, digest = image.partition("@")
    path, _, tag = name.rpartition(":")
    return {"repository": path, "tag": tag} | ({"digest": digest} if digest else {})


def _settings(serve_config: str) -> dict[str, Any]:
    """As in ``deployments/``: without what the chart fits to the pods itself."""
    settings: dict[str, Any] = yaml.safe_load(serve_config)["applications"][0]["args"]
    for ingress in ("http", "grpc"):
        settings[ingress] = {key: value for key, value in settings[ingress].items() if key not in ("host", "port")}
    if settings.get("auth") == OPEN_AUTH:
        del settings["auth"]
    settings["ingress"].pop("resources")
    if settings["ingress"]["replicas"] == INGRESS_REPLICAS:
        del settings["ingress"]["replicas"]
    if settings["batches"] is None:
        del settings["batches"]
    return {key: value for key, value in settings.items() if value != {}}


def _pods(owner: dict[str, Any]) -> dict[str, Any]:
    spec = owner["template"]["spec"]
    where = {key: spec[key] for key in ("priorityClassName", "nodeSelector", "tolerations") if key in spec}
    return {"resources": _main(owner)["resources"]} | where


def _group(group: dict[str, Any]) -> dict[str, Any]:
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    shared = volumes["shared-mem"]["emptyDir"]["sizeLimit"]
    computed = {"CPU", "GPU", group["groupName"]}
    told = group.get("resources", {})
    more = {k: v for k, v in told.items() if k not in computed and not k.startswith("accelerator_type:")}
    own = {"rayResources": more} if more else {}
    return {"hosts": group.get("numOfHosts", 1)} | _pods(group) | own | {"sharedMemory": shared}


def _redis(by_name: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    options = cluster["gcsFaultToleranceOptions"]
    own = by_name.get("StatefulSet/hycluster-redis")
    secret = {"passwordSecret": options["redisPassword"]["valueFrom"]["secretKeyRef"]}
    if own is None:
        return {"enabled": False, "address": options["redisAddress"]} | secret
    claim = own["spec"]["volumeClaimTemplates"][0]["spec"]
    return _pods(own["spec"]) | secret | {"image": _main(own["spec"])["image"]} | _storage(claim)


def _weights(by_name: dict[str, Any]) -> dict[str, Any]:
    wanted = by_name["ConfigMap/hycluster-weights"]["data"]
    said = {key.lower(): wanted[key] for key in ("REPO", "REVISION", "FOLDER")}
    return {"enabled": True} | said | _storage(by_name["PersistentVolumeClaim/hycluster-weights"]["spec"])


def _storage(claim: dict[str, Any]) -> dict[str, Any]:
    kind = {"storageClassName": claim["storageClassName"]} if "storageClassName" in claim else {}
    return {"size": claim["resources"]["requests"]["storage"]} | kind


def _rdma(fabric: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    container = _main(group)
    (device,) = (name for name in container["resources"]["limits"] if "/" in name and not name.endswith("/gpu"))
    lock = "add" in container["securityContext"]["capabilities"]
    return {"enabled": True, "resource": device, "environment": fabric["data"], "ipcLock": lock}


def _cidrs(policy: dict[str, Any]) -> list[str]:
    return [peer["ipBlock"]["cidr"] for peer in policy["spec"]["egress"][0]["to"]]


def _keys_database(policy: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    (url,) = (entry for entry in _main(group)["env"] if entry["name"] == "HYCLUSTER_AUTH_DATABASE")
    port = policy["spec"]["egress"][0]["ports"][0]["port"]
    return {"enabled": True, "secret": url["valueFrom"]["secretKeyRef"], "cidrs": _cidrs(policy), "port": port}


def _clients(policy: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for peer in policy["spec"]["ingress"][0]["from"]:
        if "namespaceSelector" in peer:
            pods = {"podLabels": peer["podSelector"]["matchLabels"]} if "podSelector" in peer else {}
            found.append({"namespaceLabels": peer["namespaceSelector"]["matchLabels"]} | pods)
    return found
