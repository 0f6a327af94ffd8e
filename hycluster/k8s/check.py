"""Manifests before a cluster sees them: what an API server would refuse, and then the rules in ``rules``.

All resources are looked at together, as they would be applied: a platform's own kustomization, what a chart renders, or
any stream of YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hycluster.errors import InvalidInput
from hycluster.k8s.pods import All, Broken, Pod, Resource, name_of, pods_of
from hycluster.k8s.rules import access, network, objects, ray, routes, serving, sources, syntax
from hycluster.k8s.rules import pod as pod_rules

EXTRA = "pip install 'hycluster[k8s]'"
Rule = Callable[[Resource, All], Iterator[Broken]]
RULES: Sequence[tuple[tuple[str, ...], Sequence[Rule]]] = (
    (("RayService", "RayJob", "RayCronJob", "RayCluster"), ray.RULES),
    (("RayService",), (*ray.SERVICE_RULES, *serving.RULES, *sources.RULES, *network.RAY_RULES, *access.RAY_RULES)),
    (("RayJob", "RayCronJob"), ray.JOB_RULES),
    (("Service",), (*network.SERVICE_RULES, *access.SERVICE_RULES, *syntax.SERVICE_RULES)),
    (("NetworkPolicy",), (*network.POLICY_RULES, *access.POLICY_RULES, *syntax.POLICY_RULES)),
    (("ServiceMonitor",), network.MONITOR_RULES),
    (("PodMonitor",), network.POD_MONITOR_RULES),
    (("HTTPRoute", "GRPCRoute"), routes.RULES),
    (("Ingress",), access.INGRESS_RULES),
    (("StatefulSet", "Deployment"), objects.WORKLOAD_RULES),
    (("PodDisruptionBudget",), objects.BUDGET_RULES),
    (("Namespace",), objects.NAMESPACE_RULES),
    (("ServiceAccount",), objects.ACCOUNT_RULES),
    (("PersistentVolumeClaim",), objects.CLAIM_RULES),
    (("ConfigMap",), objects.CONFIG_RULES),
    (("PriorityClass",), objects.PRIORITY_RULES),
)


class CheckError(InvalidInput):
    """There is nothing that could be checked, or nothing to check it with."""


@dataclass(frozen=True)
class Violation:
    """A broken rule, and whose."""

    resource: str
    broken: Broken

    def __str__(self) -> str:
        field, wrong, allowed, why = self.broken
        return f"{self.resource}: {field}: {wrong}; must {allowed} ({why})"


def faults(resources: Sequence[Resource], *, digests: bool = False) -> list[Violation]:
    """All that is wrong. Rules are asked only when no API server would refuse a resource."""
    return refused(resources) or broken(resources, digests=digests)


def refused(resources: Sequence[Resource]) -> list[Violation]:
    """What an API server would not take.

    Raises:
        CheckError: a package that knows the definitions is not installed.
    """
    try:
        from hycluster.k8s.schema import is_known, schema_errors
    except ModuleNotFoundError as error:
        raise CheckError(f"k8s check needs the package {error.name}: {EXTRA}") from error
    found = []
    for resource in resources:
        for told in schema_errors(resource) if is_known(resource) else ():
            field, _, message = told.removeprefix("$").removeprefix(".").partition(": ")
            fault = Broken(field or "(all of it)", message, "be as its definition says", "the API server refuses it")
            found.append(Violation(name_of(resource), fault))
    return found


def unknown(resources: Sequence[Resource]) -> list[str]:
    """Resources of kinds whose definition is not here."""
    from hycluster.k8s.schema import is_known

    return [f"{name_of(resource)} ({resource['apiVersion']})" for resource in resources if not is_known(resource)]


def broken(resources: Sequence[Resource], *, digests: bool = False) -> list[Violation]:
    """The rules that manifests break.

    Args:
        digests: images must be named by their digests.
    """
    pods = [pod for resource in resources for pod in pods_of(resource)]
    # Definitions do not say so, only servers.
    empty = [pod for pod in pods if not pod.spec.get("containers")]
    every = All(resources, [pod for pod in pods if pod not in empty], digests)
    nothing = Broken("spec.containers", "there is none", "be one at least", "the API server refuses it")
    found = [Violation(pod.owner, nothing._replace(field=_below(pod, nothing))) for pod in empty]
    if empty:
        return found
    for each in every.pods:
        for pod_rule in (*pod_rules.RULES, *access.POD_RULES, *syntax.POD_RULES):
            found += [
                Violation(each.owner, fault._replace(field=_below(each, fault))) for fault in pod_rule(each, every)
            ]
    for resource in resources:
        found += [
            Violation(name_of(resource), fault) for rule in syntax.RESOURCE_RULES for fault in rule(resource, every)
        ]
        for kinds, rules in RULES:
            if resource.get("kind") in kinds:
                found += [Violation(name_of(resource), fault) for rule in rules for fault in rule(resource, every)]
    return found


def _below(pod: Pod, fault: Broken) -> str:
    """The field's path from the resource on."""
    if fault.field.startswith("../"):
        return f"{pod.path.removesuffix('.template')}.{fault.field.removeprefix('../')}"
    return f"{pod.path}.{fault.field}" if pod.path else fault.field
