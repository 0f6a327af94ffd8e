"""Rules between the settings that a RayService starts with and its pods."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from pydantic import ValidationError

from hycluster.errors import SettingsError
from hycluster.k8s.pods import All, Broken, Pod, Resource, annotations_of, pods_of
from hycluster.k8s.render import APP_NAME, IMPORT_PATH, PORTS
from hycluster.k8s.rules.drain import DRAIN
from hycluster.k8s.rules.network import way_out
from hycluster.k8s.sizes import SERVE_MARGIN_S, deletion_delay_s, stored_remotely
from hycluster.replica.placement import on_gpus, reserved
from hycluster.settings.model import Model
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings
from hycluster.settings.unique_keys import read_yaml

STORE_PORT = 443
# As ``hycluster/auth/database.py`` reads it.
KEYS_DATABASE = "HYCLUSTER_AUTH_DATABASE"
SERVE = "spec.serveConfigV2"


def settings_of_service(resource: Resource) -> Settings | None:
    """Those that the pods start with; None if they are wrong."""
    return _read(resource["spec"].get("serveConfigV2") or "")


@cache
def _read(text: str) -> Settings | None:
    try:
        serve = yaml.safe_load(text)
        return validate(Settings, serve["applications"][0]["args"], "args")
    except (SettingsError, yaml.YAMLError, KeyError, TypeError, IndexError):
        return None


def _serve_config(resource: Resource, _all: All) -> Iterator[Broken]:
    yield from _wrong_in(resource["spec"].get("serveConfigV2") or "")


@cache
def _wrong_in(text: str) -> tuple[Broken, ...]:
    return tuple(_wrong(text))


def _wrong(text: str) -> Iterator[Broken]:
    from ray.serve.schema import ServeDeploySchema

    try:
        serve = read_yaml(text)
        if serve is None:
            yield Broken(
                SERVE, "there is none", "be Ray Serve's settings (hycluster k8s render)", "nothing would start"
            )
            return
        known = ServeDeploySchema.model_validate(serve).model_dump(mode="json")
        (application,) = serve["applications"]
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            where = ".".join(map(str, problem["loc"]))
            yield Broken(f"{SERVE}{where and '.'}{where}", problem["msg"], "be as Ray Serve has it", "Serve refuses it")
        return
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        yield Broken(SERVE, " ".join(str(error).split())[:300], "be Ray Serve's settings", "Serve would refuse it")
        return
    for lost in _dropped(serve, known, ""):
        yield Broken(f"{SERVE}{lost}", "Serve does not know it", "go", "Serve would leave it out without a word")
    if serve.get("proxy_location") != "Disabled":
        yield Broken(
            f"{SERVE}.proxy_location",
            str(serve.get("proxy_location")),
            "be Disabled",
            "Serve's proxies would listen on the ingress ports",
        )
    started = (application.get("name"), application.get("import_path"))
    if started != (APP_NAME, IMPORT_PATH):
        yield Broken(
            f"{SERVE}.applications[0]",
            f"{started}",
            f"start {IMPORT_PATH} by the name {APP_NAME}",
            "nothing else is known",
        )
    try:
        validate(Settings, application.get("args") or {}, "args")
    except SettingsError as error:
        for line in error.message.splitlines():
            yield Broken(f"{SERVE}.applications[0].args", line, "be valid settings", "no process would start")


def _dropped(given: Any, kept: Any, path: str) -> Iterator[str]:
    """Keys that a schema has lost."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from _dropped(value, kept[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from _dropped(value, kept[index], f"{path}[{index}]")


def _roles(resource: Resource, role: str) -> list[Pod]:
    return [pod for pod in pods_of(resource) if pod.role == role]


def _ingresses(resource: Resource, _all: All) -> Iterator[Broken]:
    settings = settings_of_service(resource)
    if settings is None:
        return
    pods = _roles(resource, "ingress")
    if not pods:
        yield Broken("spec.rayClusterConfig.workerGroupSpecs", "no ingress group", "have one", "nobody would answer")
        return
    pod, count = pods[0], sum(each.count for each in pods)
    args = f"{SERVE}.applications[0].args"
    wanted = settings.ingress.resources.get("ingress", 0)
    there = float((pod.group.get("resources") or {}).get("ingress", 0))
    if not 0 < 2 * wanted <= there:
        yield Broken(
            f"{args}.ingress.resources.ingress",
            f"{wanted:g} of {there:g} a pod",
            "be above 0 and leave room for an ingress process's successor: half of the group's, or less",
            "a change of the settings would wait for ever, or ingress processes go anywhere",
        )
    if not 2 <= settings.ingress.replicas <= count:
        yield Broken(
            f"{args}.ingress.replicas",
            f"{settings.ingress.replicas} in {count} pods",
            f"be from 2 to {count}, a pod each",
            "a lost pod would leave nobody to answer",
        )
    if settings.ingress.replicas_per_node != 1:
        yield Broken(
            f"{args}.ingress.replicas_per_node",
            f"ingress.replicas_per_node: {settings.ingress.replicas_per_node}",
            "be 1",
            "the loss or the drain of one pod would take more than one ingress process",
        )
    ports = {port.get("name"): port["containerPort"] for port in pod.main.get("ports") or ()}
    listening = {
        "ingress-http": (settings.http.host, settings.http.port),
        "ingress-grpc": (settings.grpc.host, settings.grpc.port),
    }
    for name, (host, port) in listening.items():
        if port != ports.get(name) or host != "0.0.0.0":
            yield Broken(
                f"{args}.{name.removeprefix('ingress-')}",
                f"{host}:{port}",
                f"be 0.0.0.0:{ports.get(name, PORTS[name.removeprefix('ingress-')])}, the port {name} of the"
                " ingress pods",
                "the Service would find nobody",
            )


def _drains_in_time(resource: Resource, _all: All) -> Iterator[Broken]:
    settings = settings_of_service(resource)
    if settings is None:
        return
    needs_s = settings.drain_timeout_s + SERVE_MARGIN_S
    for pod in pods_of(resource):
        if pod.role == "head" or not pod.group:
            continue
        has = pod.env.get(DRAIN) or "30"
        if float(has) < needs_s:
            yield Broken(
                f"{pod.path}.spec.containers[0].env[{DRAIN}]",
                has,
                f"be {needs_s:g} or more: drain_timeout_s {settings.drain_timeout_s:g} and Serve's {SERVE_MARGIN_S}",
                "Ray ends what still drains",
            )
    delay, least = resource["spec"].get("rayClusterDeletionDelaySeconds", 60), deletion_delay_s(settings)
    if delay < least:
        yield Broken(
            "spec.rayClusterDeletionDelaySeconds",
            str(delay),
            f"be {least} or more, as long as work may go on: drain_timeout_s {settings.drain_timeout_s:g}",
            "the old cluster's head and workers are removed together, and with them what they have in work",
        )


def _engines(resource: Resource, _all: All) -> Iterator[Broken]:
    """Pods for as many replicas as the settings want at the least, and at the most."""
    settings = settings_of_service(resource)
    if settings is None:
        return
    pods = _roles(resource, "engines")
    for pod, models in _homes(settings, pods):
        if pod is None:
            model = models[0]
            yield Broken(
                "spec.rayClusterConfig.workerGroupSpecs",
                f"no group for {model.name}",
                f"have a group whose resources have {', '.join(_wants(model)) or 'CPUs'}",
                "the autoscaler must know what a node will have before there is one",
            )
            continue
        yield from _room(pod, models)


def _homes(settings: Settings, pods: list[Pod]) -> Iterator[tuple[Pod | None, list[Model]]]:
    """Groups, and the models whose replicas go there."""
    found: dict[int, list[Model]] = {}
    for model in settings.models:
        place = next((i for i, pod in enumerate(pods) if is_home(model, pod)), None)
        if place is None:
            yield None, [model]
        else:
            found.setdefault(place, []).append(model)
    for place, models in found.items():
        yield pods[place], models


def _wants(model: Model) -> list[str]:
    """Names of Ray's resources that the group's nodes must have."""
    kind = [f"accelerator_type:{model.hardware.accelerator}"] if on_gpus(model) else []
    return kind + list(model.hardware.resources)


def is_home(model: Model, pod: Pod) -> bool:
    return set(_wants(model)) <= (pod.group.get("resources") or {}).keys()


def _room(pod: Pod, models: list[Model]) -> Iterator[Broken]:
    group = pod.path.removesuffix(".template")
    for resource, name in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
        each = pod.limit(name) * pod.hosts
        least, most = (each * pod.bound(bound) for bound in ("minReplicas", "maxReplicas"))
        wanted = sum(reserved(model).get(resource, 0) * model.replicas.min for model in models)
        if wanted > least or (resource == "GPU" and wanted != least):
            yield Broken(
                f"{group}.minReplicas",
                f"{least:g} {resource}s in {pod.bound('minReplicas')} x {pod.hosts} pods",
                f"be as many as hold {wanted:g}, as the settings ask for",
                "replicas would wait for a pod, or GPUs for a replica",
            )
        wanted = sum(reserved(model).get(resource, 0) * model.replicas.most for model in models)
        if wanted > most:
            yield Broken(
                f"{group}.maxReplicas",
                f"{most:g} {resource}s in {pod.bound('maxReplicas')} x {pod.hosts} pods",
                f"be as many as hold {wanted:g}, which the settings allow",
                "the load would ask for replicas that never come",
            )


def _batches_have_a_home(resource: Resource, _all: All) -> Iterator[Broken]:
    """The Batch API's process sits where the store's credentials are, on no engine's pod."""
    settings = settings_of_service(resource)
    if settings is None or settings.batches is None:
        return
    wanted = settings.batches.resources
    there = [pod.group.get("resources") or {} for pod in _roles(resource, "ingress")]
    if not wanted or not any(float(has.get(name, 0)) >= amount for has in there for name, amount in wanted.items()):
        yield Broken(
            f"{SERVE}.applications[0].args.batches.resources",
            str(wanted),
            f"be what the ingress group has and engines have not: {there}",
            "the Batch API's process would wait for a node, or keep one with GPUs, without the store's secret",
        )


def _store_is_reachable(resource: Resource, every: All) -> Iterator[Broken]:
    """Ingress processes take uploads and run the Batch API: they need the object store's credentials, and a way
    there."""
    settings = settings_of_service(resource)
    if settings is None or not stored_remotely(settings):
        return
    store = f"batches.store: {settings.batches.store}" if settings.batches else ""
    trusted = {a["metadata"]["name"] for a in every.of_kind("ServiceAccount") if annotations_of(a)}
    for pod in _roles(resource, "ingress"):
        secret = any("secretRef" in each for each in pod.main.get("envFrom") or ())
        if not secret and "AWS_ACCESS_KEY_ID" not in pod.env and pod.spec.get("serviceAccountName") not in trusted:
            yield Broken(
                f"{pod.path}.spec.containers[0].envFrom",
                f"no credentials for {store}",
                "have a secretRef, or an account that the store trusts (with an annotation)",
                "the Batch API would answer with errors",
            )
        if not way_out(pod, STORE_PORT, every):
            yield Broken(
                f"{pod.path}.metadata.labels",
                f"no NetworkPolicy here lets it out to {store}",
                f"be let out at {STORE_PORT}",
                "uploads would hang",
            )


def _keys_have_a_database(resource: Resource, _all: All) -> Iterator[Broken]:
    settings = settings_of_service(resource)
    if settings is None or not (settings.auth.enabled and settings.auth.keys):
        return
    given = settings.auth.database or ""
    for pod in _roles(resource, "ingress"):
        if given.startswith("sqlite") or not (given or KEYS_DATABASE in pod.env):
            yield Broken(
                f"{pod.path}.spec.containers[0].env",
                given or f"no {KEYS_DATABASE}, and no auth.database in the settings",
                f"have {KEYS_DATABASE} from a secret (components/keys-database)",
                "each pod would have a file of keys of its own, and lose it",
            )


def _hub_is_reachable(resource: Resource, every: All) -> Iterator[Broken]:
    settings = settings_of_service(resource)
    hubs = [m.source for m in settings.models if not m.source.startswith(("/", "package:"))] if settings else []
    for pod in pods_of(resource) if hubs else ():
        offline = pod.env.get("HF_HUB_OFFLINE") == "1"
        if pod.role in ("ingress", "engines") and not offline and not way_out(pod, 443, every):
            yield Broken(
                f"{pod.path}.metadata.labels",
                f"no NetworkPolicy here lets it out to the hub, for {', '.join(hubs)}",
                "be let out at 443 (components/hub-egress), or have the weights (components/weights)",
                "it would wait for the model's files until start_timeout_s",
            )


RULES = (
    _serve_config,
    _ingresses,
    _drains_in_time,
    _engines,
    _batches_have_a_home,
    _store_is_reachable,
    _keys_have_a_database,
    _hub_is_reachable,
)
