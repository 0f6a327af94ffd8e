"""Rules of ways to the ingress past which nobody is asked for credentials: addresses, and Services that a node has."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from hycluster.k8s.pods import All, Broken, Pod, Resource, annotations_of, labels_of
from hycluster.k8s.rules.objects import selected
from hycluster.k8s.rules.routes import AUTHENTICATED_BY

OUTSIDE = ("LoadBalancer", "NodePort")
WHY = "the ingress asks for no credentials, and whoever finds the address has the GPUs"
# No network of one's own is wider: 10.0.0.0/8, fc00::/7.
NARROWEST_OF_ALL = {4: 8, 6: 7}


def is_everybody(cidr: str) -> bool:
    """Whether a block is the Internet, or a large part of it."""
    try:
        network = ipaddress.ip_network(cidr, strict=False)
    except ValueError:
        return False
    return network.prefixlen < NARROWEST_OF_ALL[network.version]


def _answered_for(resource: Resource) -> bool:
    return bool(annotations_of(resource).get(AUTHENTICATED_BY, "").strip())


def _admits_nobody_unasked(resource: Resource, every: All) -> Iterator[Broken]:
    targets = selected(resource["spec"].get("podSelector") or {}, every)
    if not any(pod.role == "ingress" for pod in targets) or _answered_for(resource):
        return
    for index, rule in enumerate(resource["spec"].get("ingress") or ()):
        for place, peer in enumerate(rule.get("from") or ()):
            cidr = (peer.get("ipBlock") or {}).get("cidr")
            if cidr and is_everybody(cidr):
                yield Broken(
                    f"spec.ingress[{index}].from[{place}].ipBlock.cidr",
                    cidr,
                    f"be narrower, or the annotation {AUTHENTICATED_BY} say in words who asks for credentials",
                    WHY,
                )


def _is_inside(resource: Resource, every: All) -> Iterator[Broken]:
    spec = resource["spec"]
    pods = selected(spec["selector"], every) if spec.get("selector") else []
    if any(pod.role in ("ingress", "head") for pod in pods) and not _answered_for(resource):
        yield from _kept_inside("spec", spec)


def _rays_are_inside(resource: Resource, _all: All) -> Iterator[Broken]:
    """KubeRay's own Services, for the ingress processes and for the head."""
    if _answered_for(resource):
        return
    spec = resource["spec"]
    cluster = spec.get("rayClusterConfig") or {}
    head = cluster.get("headGroupSpec") or {}
    services = {
        "spec.serveService.spec": (spec.get("serveService") or {}).get("spec"),
        "spec.rayClusterConfig.headGroupSpec.headService.spec": (head.get("headService") or {}).get("spec"),
    }
    for path, service in services.items():
        yield from _kept_inside(path, service or {})
    if head.get("serviceType") in OUTSIDE:
        yield Broken(
            "spec.rayClusterConfig.headGroupSpec.serviceType",
            head["serviceType"],
            "be ClusterIP",
            "who reaches Ray's ports runs code there",
        )


def _kept_inside(path: str, spec: Resource) -> Iterator[Broken]:
    said = f"or the annotation {AUTHENTICATED_BY} say in words who asks for credentials"
    if spec.get("type") in OUTSIDE:
        yield Broken(f"{path}.type", spec["type"], f"be ClusterIP, behind a gateway, {said}", WHY)
    if spec.get("externalIPs"):
        yield Broken(f"{path}.externalIPs", str(spec["externalIPs"]), f"go, {said}", WHY)


def _asks_for_credentials(resource: Resource, every: All) -> Iterator[Broken]:
    """An Ingress, in its controller's words: all of them have "auth" in what asks for credentials."""
    ingresses = {
        s["metadata"]["name"] for s in every.of_kind("Service") if labels_of(s).get("hycluster/role") == "ingress"
    }
    said = annotations_of(resource)
    if not ingresses & _backends(resource) or _answered_for(resource):
        return
    if not any("auth" in f"{key} {value}".lower() for key, value in said.items() if value.strip()):
        yield Broken(
            "metadata.annotations",
            "nobody is asked for credentials",
            "have the controller ask (such as nginx.ingress.kubernetes.io/auth-url), or"
            f" {AUTHENTICATED_BY} say in words who does",
            WHY,
        )


def _backends(ingress: Resource) -> set[str]:
    spec = ingress["spec"]
    paths = [path for rule in spec.get("rules") or () for path in (rule.get("http") or {}).get("paths") or ()]
    backends = [*(path["backend"] for path in paths), *filter(None, [spec.get("defaultBackend")])]
    return {(backend.get("service") or {}).get("name", "") for backend in backends}


def _no_port_of_the_node(pod: Pod, _all: All) -> Iterator[Broken]:
    """A node's own port is past every policy and every gateway."""
    if pod.role not in ("ingress", "head", "engines"):
        return
    if pod.spec.get("hostNetwork"):
        yield Broken("spec.hostNetwork", "true", "be false", "policies do not hold for what listens on the node")
    for path, container in pod.containers:
        for index, port in enumerate(container.get("ports") or ()):
            if port.get("hostPort"):
                yield Broken(
                    f"{path}.ports[{index}].hostPort", str(port["hostPort"]), "go", "it is open on the node's address"
                )


POLICY_RULES = (_admits_nobody_unasked,)
SERVICE_RULES = (_is_inside,)
RAY_RULES = (_rays_are_inside,)
INGRESS_RULES = (_asks_for_credentials,)
POD_RULES = (_no_port_of_the_node,)
