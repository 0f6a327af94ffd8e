"""Rules of what stands beside the pods: budgets, namespaces, accounts, volumes, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from hycluster.errors import SettingsError
from hycluster.k8s.pods import All, Broken, Pod, Resource, annotations_of, labels_of, name_of
from hycluster.settings.read import validate
from hycluster.settings.settings import Settings

ENFORCE = "pod-security.kubernetes.io/enforce"
# In words, why a namespace allows more than the restricted standard.
PRIVILEGED_BECAUSE = "hycluster/pod-security"
HUB_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"
MUST_HAVE_A_VALUE = ("INPUT", "OUTPUT", "JOB", "REPO", "REVISION")


def selected(selector: Resource, every: All) -> list[Pod]:
    """Pods that a selector takes: a map of labels, or Kubernetes' two forms of them."""
    forms = {"matchLabels", "matchExpressions"}
    wanted = selector.get("matchLabels") or {} if selector.keys() & forms else selector
    asked = selector.get("matchExpressions") or ()
    return [
        pod
        for pod in every.pods
        if wanted.items() <= pod.labels.items() and all(_holds(each, pod.labels) for each in asked)
    ]


def _holds(expression: Resource, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or ()
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[expression["operator"]]


def selects_somebody(resource: Resource, every: All) -> Iterator[Broken]:
    spec = resource["spec"]
    key = "podSelector" if "podSelector" in spec else "selector"
    if spec.get(key) and not selected(spec[key], every):
        yield Broken(f"spec.{key}", f"{spec[key]} selects no pod", "select a pod that is here", "it is without effect")


def _budget(resource: Resource, every: All) -> Iterator[Broken]:
    spec = resource["spec"]
    least = spec.get("minAvailable")
    if not isinstance(least, int) or "maxUnavailable" in spec:
        yield Broken(
            "spec.minAvailable",
            str(least if "maxUnavailable" not in spec else "maxUnavailable"),
            "be a number",
            "nothing with a size stands behind Ray's pods",
        )
        return
    pods = selected(spec.get("selector") or {}, every)
    there = sum(pod.count for pod in pods)
    one = max((pod.hosts for pod in pods), default=1)
    # The last one stays until somebody decides; of several, one at a time goes.
    lowest, highest = (there, there) if there <= one else (there - one, there - 1)
    if not lowest <= least <= highest:
        yield Broken(
            "spec.minAvailable",
            f"{least} of {there} pods",
            f"be {lowest}" if lowest == highest else f"be from {lowest} to {highest}",
            "a drain of nodes would take more than one at once" if least < lowest else "no drain would ever end",
        )


def _restricted(resource: Resource, _all: All) -> Iterator[Broken]:
    enforced = labels_of(resource).get(ENFORCE)
    if enforced != "restricted" and not annotations_of(resource).get(PRIVILEGED_BECAUSE, "").strip():
        yield Broken(
            f"metadata.labels.{ENFORCE}",
            str(enforced),
            f"be restricted, or the annotation {PRIVILEGED_BECAUSE} say why not",
            "pods could be root",
        )


def _outlives(resource: Resource, every: All) -> Iterator[Broken]:
    """A namespace is not deleted together with a cluster in it."""
    kept = annotations_of(resource).get("helm.sh/resource-policy") == "keep"
    if kept and labels_of(resource).get("app.kubernetes.io/managed-by") == "Helm":
        return
    within = [r for r in every.of_kind("RayService") if r["metadata"].get("namespace") == resource["metadata"]["name"]]
    if within:
        yield Broken(
            "metadata.name",
            f"{resource['metadata']['name']}, together with {name_of(within[0])}",
            "be in a kustomization of its own (k8s/cluster), or kept by Helm (helm.sh/resource-policy: keep)",
            "a delete would hang for good: KubeRay makes one more Job there, which a namespace that ends forbids",
        )


def _grants_nothing(resource: Resource, _all: All) -> Iterator[Broken]:
    if resource.get("automountServiceAccountToken") is not False:
        yield Broken(
            "automountServiceAccountToken",
            str(resource.get("automountServiceAccountToken")),
            "be false",
            "its pods would get a token",
        )


def _shared(resource: Resource, every: All) -> Iterator[Broken]:
    """A claim that pods of several nodes mount."""
    name, modes = resource["metadata"]["name"], resource["spec"].get("accessModes") or []
    users = [
        pod
        for pod in every.pods
        for volume in pod.spec.get("volumes") or ()
        if (volume.get("persistentVolumeClaim") or {}).get("claimName") == name
    ]
    if not set(modes) & {"ReadWriteMany", "ReadOnlyMany"} and sum(pod.count for pod in users) > 1:
        yield Broken(
            "spec.accessModes", str(modes), "be [ReadWriteMany]", "the pods that mount it are on several nodes"
        )


def settings_in(config: Resource) -> Settings | None:
    """Those of a job's ConfigMap; None if it has none that are right."""
    try:
        return validate(Settings, yaml.safe_load(config["data"]["settings.yaml"]), "settings.yaml")
    except (SettingsError, yaml.YAMLError, KeyError, TypeError):
        return None


def _values(resource: Resource, _all: All) -> Iterator[Broken]:
    data = resource.get("data") or {}
    if "settings.yaml" in data:
        try:
            validate(Settings, yaml.safe_load(data["settings.yaml"]), "settings.yaml")
        except yaml.YAMLError as error:
            yield Broken("data.settings.yaml", " ".join(str(error).split()), "be YAML", "the job does not start")
        except SettingsError as error:
            for line in error.message.splitlines():
                yield Broken("data.settings.yaml", line, "be valid settings", "the job does not start")
    for key in MUST_HAVE_A_VALUE:
        if data.get(key) == "":
            yield Broken(f"data.{key}", "is empty", "have a value", "what reads it would act on nothing")
    if data.get("REPO") and not re.fullmatch(HUB_ID, data["REPO"]):
        yield Broken("data.REPO", repr(data["REPO"]), "be a hub id: ORGANISATION/NAME", "nothing would be fetched")


def _order(resource: Resource, every: All) -> Iterator[Broken]:
    """Control plane above engines above jobs."""
    if resource.get("globalDefault"):
        yield Broken("globalDefault", "true", "be false", "everybody's pods would be as important")
    values = {each["metadata"]["name"]: each["value"] for each in every.of_kind("PriorityClass")}
    order = [name for name in ("hycluster-control", "hycluster-engines", "hycluster-jobs") if name in values]
    name = resource["metadata"]["name"]
    above = order[: order.index(name)] if name in order else []
    if above and resource["value"] >= values[above[-1]]:
        yield Broken(
            "value",
            str(resource["value"]),
            f"be below {above[-1]}'s, {values[above[-1]]}",
            "the control plane goes last, and jobs first",
        )


WORKLOAD_RULES = (selects_somebody,)
BUDGET_RULES = (selects_somebody, _budget)
NAMESPACE_RULES = (_restricted, _outlives)
ACCOUNT_RULES = (_grants_nothing,)
CLAIM_RULES = (_shared,)
CONFIG_RULES = (_values,)
PRIORITY_RULES = (_order,)
