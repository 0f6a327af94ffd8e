"""Rules of values' form that definitions leave open and servers do not: addresses, labels, ports, spans of time."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from hycluster.k8s.pods import All, Broken, Pod, Resource
from hycluster.settings.base import LABEL_KEY, LABEL_VALUE
from hycluster.settings.settings import MAX_DRAIN_S

# A drain of a day, and what a pod needs besides.
MAX_GRACE_S = MAX_DRAIN_S + 3600
REFUSED = "the API server refuses it"


def _labels(path: str, labels: Resource | None) -> Iterator[Broken]:
    for key, value in (labels or {}).items():
        if not re.fullmatch(LABEL_KEY, str(key)):
            yield Broken(path, repr(key), "be a label's name: [PREFIX/]NAME of 63 characters or fewer", REFUSED)
        if not isinstance(value, str) or not re.fullmatch(LABEL_VALUE, value):
            yield Broken(
                f"{path}.{key}", repr(value), "be 63 letters, digits, '-', '_' or '.' or fewer, in quotes", REFUSED
            )


def _pod(pod: Pod, _all: All) -> Iterator[Broken]:
    yield from _labels("metadata.labels", pod.labels)
    yield from _labels("spec.nodeSelector", pod.spec.get("nodeSelector"))
    grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
    if grace_s > MAX_GRACE_S:
        yield Broken(
            "spec.terminationGracePeriodSeconds",
            str(grace_s),
            f"be {MAX_GRACE_S} or less",
            "a node that is drained would wait for it",
        )
    for path, container in pod.containers:
        for index, port in enumerate(container.get("ports") or ()):
            yield from _port(f"{path}.ports[{index}].containerPort", port["containerPort"])


def _port(path: str, port: object) -> Iterator[Broken]:
    if isinstance(port, int) and not 1 <= port <= 65535:
        yield Broken(path, str(port), "be from 1 to 65535", REFUSED)


def _own_labels(resource: Resource, _all: All) -> Iterator[Broken]:
    yield from _labels("metadata.labels", (resource.get("metadata") or {}).get("labels"))


def _service(resource: Resource, _all: All) -> Iterator[Broken]:
    yield from _labels("spec.selector", resource["spec"].get("selector"))
    for index, port in enumerate(resource["spec"].get("ports") or ()):
        yield from _port(f"spec.ports[{index}].port", port["port"])
        yield from _port(f"spec.ports[{index}].targetPort", port.get("targetPort"))


def _policy(resource: Resource, _all: All) -> Iterator[Broken]:
    spec = resource["spec"]
    yield from _labels("spec.podSelector.matchLabels", (spec.get("podSelector") or {}).get("matchLabels"))
    for way, side in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(way) or ()):
            for place, port in enumerate(rule.get("ports") or ()):
                yield from _port(f"spec.{way}[{index}].ports[{place}].port", port.get("port"))
            for place, peer in enumerate(rule.get(side) or ()):
                path = f"spec.{way}[{index}].{side}[{place}]"
                for name in ("podSelector", "namespaceSelector"):
                    yield from _labels(f"{path}.{name}.matchLabels", (peer.get(name) or {}).get("matchLabels"))
                yield from _block(f"{path}.ipBlock", peer.get("ipBlock"))


def _block(path: str, block: Resource | None) -> Iterator[Broken]:
    if not block:
        return
    whole = _network(block["cidr"])
    if whole is None:
        yield Broken(f"{path}.cidr", repr(block["cidr"]), "be a network, such as 10.0.0.0/8", REFUSED)
        return
    for index, each in enumerate(block.get("except") or ()):
        part = _network(each)
        inside = part is not None and part.version == whole.version and part.prefixlen > whole.prefixlen
        if part is None or not inside or part.network_address not in whole:
            yield Broken(f"{path}.except[{index}]", repr(each), f"be a network within {block['cidr']}", REFUSED)


def _network(cidr: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """None where it is none; as servers have it, bits beyond the prefix are of no account."""
    try:
        return ipaddress.ip_network(cidr, strict=False) if "/" in cidr else None
    except ValueError:
        return None


POD_RULES = (_pod,)
RESOURCE_RULES = (_own_labels,)
SERVICE_RULES = (_service,)
POLICY_RULES = (_policy,)
