"""Rules of what a service's pods read and write: weights, and the Batch API's store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from hycluster.k8s.pods import All, Broken, Pod, Resource, pods_of
from hycluster.k8s.rules.serving import SERVE, is_home, settings_of_service
from hycluster.settings.model import Model


def kept_at(pod: Pod, folder: str, *, written: bool = False) -> bool:
    """Whether a volume that outlives the pod is mounted at a folder, or above it.

    Args:
        written: it must not be mounted to be read only.
    """
    own = {volume["name"] for volume in pod.spec.get("volumes") or () if "emptyDir" in volume}
    place = PurePosixPath(folder)
    return ".." not in place.parts and any(
        place.is_relative_to(mount["mountPath"]) and not (written and mount.get("readOnly"))
        for mount in pod.main.get("volumeMounts") or ()
        if mount["name"] not in own
    )


def _store_is_shared(resource: Resource, _all: All) -> Iterator[Broken]:
    settings = settings_of_service(resource)
    store = (settings.batches.store or "") if settings and settings.batches else "s3://"
    field = f"{SERVE}.applications[0].args.batches.store"
    if store.startswith("s3://"):
        return
    if not store.startswith("/"):
        yield Broken(field, repr(store), "be s3://BUCKET/... or an absolute folder", "it would be a folder of one pod")
        return
    for pod in pods_of(resource):
        if pod.role == "ingress" and not kept_at(pod, store, written=True):
            yield Broken(
                field,
                repr(store),
                f"be s3://BUCKET/... or below a volumeMount of {pod.path} that many pods write to",
                "each pod would have a folder of its own, which goes with it",
            )


def _weights_are_there(resource: Resource, every: All) -> Iterator[Broken]:
    """Where engines are told to ask no hub, each source is a folder of a volume or what the first step fetches."""
    settings = settings_of_service(resource)
    for model in settings.models if settings else ():
        if model.simulated is not None or model.source.startswith("package:"):
            continue
        for pod in pods_of(resource):
            if pod.role == "engines" and is_home(model, pod):
                yield from _has(pod, model, every)


def _has(pod: Pod, model: Model, every: All) -> Iterator[Broken]:
    sources = {"source": model.source} | {f"adapters.{a.name}.source": a.source for a in model.adapters}
    for key, source in sources.items():
        field = f"{SERVE}.applications[0].args.models.{model.name}.{key}"
        if source.startswith("/"):
            if not kept_at(pod, source):
                yield Broken(
                    field, repr(source), f"be below a volumeMount of {pod.path}", "the engine would find no weights"
                )
        elif pod.env.get("HF_HUB_OFFLINE") == "1" and source not in (fetched := _fetched(pod, every)):
            yield Broken(
                field,
                repr(source),
                f"be {' or '.join(sorted(fetched)) or 'below a volumeMount'}: what the first step fetches whole",
                "HF_HUB_OFFLINE is set, so the engine asks no hub for it",
            )


def _fetched(pod: Pod, every: All) -> set[str]:
    """Hub ids that the pod's first steps fetch whole."""
    steps = pod.spec.get("initContainers") or ()
    names = {(each.get("configMapRef") or {}).get("name") for step in steps for each in step.get("envFrom") or ()}
    data = [m.get("data") or {} for m in every.of_kind("ConfigMap") if m["metadata"]["name"] in names]
    found = {each["REPO"] for each in data if each.get("REPO") and not each.get("FOLDER")}
    for step in steps:
        env = {entry["name"]: entry.get("value") for entry in step.get("env") or ()}
        if env.get("REPO") and not env.get("FOLDER"):
            found.add(str(env["REPO"]))
    return found


RULES = (_store_is_shared, _weights_are_there)
