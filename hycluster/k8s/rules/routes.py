"""Rules of routes from outside the cluster to the ingress."""

from __future__ import annotations

from collections.abc import Iterator

from hycluster.k8s.pods import All, Broken, Resource, annotations_of, labels_of
from hycluster.k8s.render import PORTS

# In words: what asks callers for credentials, if it is none of the route's own filters.
AUTHENTICATED_BY = "hycluster/authenticated-by"
FILTERS = ("ExtensionRef", "ExternalAuth")


def _goes_to_the_ingresses(resource: Resource, every: All) -> Iterator[Broken]:
    port = PORTS["grpc" if resource["kind"] == "GRPCRoute" else "http"]
    ingresses = [
        s["metadata"]["name"] for s in every.of_kind("Service") if labels_of(s).get("hycluster/role") == "ingress"
    ]
    for index, rule in enumerate(resource["spec"].get("rules") or ()):
        for place, backend in enumerate(rule.get("backendRefs") or ()):
            if ingresses and (backend["name"] not in ingresses or backend.get("port") != port):
                yield Broken(
                    f"spec.rules[{index}].backendRefs[{place}]",
                    f"{backend['name']} at {backend.get('port')}",
                    f"be the Service {' or '.join(ingresses)} at {port}",
                    "KubeRay's own Service never has gRPC callers, and a namePrefix must reach here too",
                )


def _asks_for_credentials(resource: Resource, every: All) -> Iterator[Broken]:
    """By a filter of each rule, by a policy for the route, or by what is said in words."""
    if annotations_of(resource).get(AUTHENTICATED_BY, "").strip():
        return
    if any(_is_policy_for(other, resource) for other in every.resources):
        return
    for index, rule in enumerate(resource["spec"].get("rules") or ()):
        if not any(each["type"] in FILTERS for each in rule.get("filters") or ()):
            yield Broken(
                f"spec.rules[{index}].filters",
                "nobody is asked for credentials",
                f"have one of {' or '.join(FILTERS)}, a policy of the gateway's that targets the route, or the"
                f" annotation {AUTHENTICATED_BY} that says in words who does",
                "the ingress asks for none, and whoever finds the address has the GPUs",
            )


def _is_policy_for(policy: Resource, route: Resource) -> bool:
    """Whether this is a gateway's policy of authentication that is attached to a route (or to the gateway itself)."""
    if not any(word in str(policy.get("kind")) for word in ("SecurityPolicy", "AuthPolicy", "Authentication")):
        return False
    spec = policy.get("spec") or {}
    targets = [*(spec.get("targetRefs") or ()), *([spec["targetRef"]] if "targetRef" in spec else ())]
    names = {(route["kind"], route["metadata"]["name"])}
    names |= {("Gateway", parent["name"]) for parent in route["spec"].get("parentRefs") or ()}
    return any((target.get("kind"), target.get("name")) in names for target in targets)


RULES = (_goes_to_the_ingresses, _asks_for_credentials)
