"""Rules of who reaches whom: Services, network policies, and what Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hycluster.k8s.pods import All, Broken, Pod, Resource, annotations_of, labels_of, name_of
from hycluster.k8s.rules.access import is_everybody
from hycluster.k8s.rules.objects import selected, selects_somebody

# By KubeRay's Helm chart, and by its kustomization.
OPERATORS = {"kuberay-operator", "kuberay"}
APP = "app.kubernetes.io/name"
DASHBOARD = 8265
INGRESS_PORTS = {8000, 9000, "ingress-http", "ingress-grpc"}
CLIENTS = "hycluster/clients"
# In words, why pods may reach any address.
EGRESS_BECAUSE = "hycluster/egress"


def _ports_are_there(resource: Resource, every: All) -> Iterator[Broken]:
    spec = resource["spec"]
    pods = selected(spec["selector"], every) if spec.get("selector") else []
    open_ports = {value for pod in pods for port in _ports(pod) for value in (port.get("name"), port["containerPort"])}
    for index, port in enumerate(spec.get("ports") or () if pods else ()):
        target = port.get("targetPort", port["port"])
        if target not in open_ports:
            yield Broken(
                f"spec.ports[{index}].targetPort",
                f"no selected pod has a port {target}",
                f"be one of {_listed(open_ports)}",
                "it leads nowhere",
            )


def _ports(pod: Pod) -> list[dict[str, Any]]:
    return [port for container in pod.spec["containers"] for port in container.get("ports") or ()]


def _listed(ports: set[Any]) -> str:
    return ", ".join(sorted(str(port) for port in ports if port)) or "none"


def label_values(selector: Resource | None, key: str) -> set[str]:
    """What a label may be for a selector to take it; empty, if it does not ask."""
    found = set()
    if selector:
        if key in (selector.get("matchLabels") or {}):
            found.add(selector["matchLabels"][key])
        for each in selector.get("matchExpressions") or ():
            if each["key"] == key and each["operator"] == "In":
                found |= set(each.get("values") or ())
    return found


def is_ray(pod: Pod) -> bool:
    return bool(pod.group)


def _opens_to_named(resource: Resource, every: All) -> Iterator[Broken]:
    """Who comes in is named: everybody is nobody's intention."""
    targets = selected(resource["spec"].get("podSelector") or {}, every)
    for index, rule in enumerate(resource["spec"].get("ingress") or ()):
        path = f"spec.ingress[{index}]"
        if not rule.get("from"):
            yield Broken(
                f"{path}.from",
                "everybody",
                "name pods or namespaces",
                "neither Ray's ports nor the ingress ask for credentials",
            )
        for place, peer in enumerate(rule.get("from") or ()):
            yield from _is_narrow(f"{path}.from[{place}]", peer, rule, targets)


def _is_narrow(path: str, peer: Resource, rule: Resource, targets: list[Pod]) -> Iterator[Broken]:
    if "ipBlock" in peer or peer.get("podSelector", {"matchLabels": {}}).get("matchLabels"):
        outside = "namespaceSelector" in peer or "ipBlock" in peer
        if outside and any(is_ray(pod) for pod in targets) and not rule.get("ports"):
            yield Broken(f"{path}", "all ports", "open ports by number", "who reaches Ray's ports runs code there")
        return
    if label_values(peer.get("podSelector"), APP):
        return
    namespaces = peer.get("namespaceSelector")
    if namespaces is not None and CLIENTS not in (namespaces.get("matchLabels") or {}):
        opened = {port.get("port") for port in rule.get("ports") or ()}
        if not rule.get("ports") or opened & INGRESS_PORTS or any(is_ray(pod) for pod in targets):
            yield Broken(
                f"{path}.podSelector",
                f"all pods of namespaces {namespaces}",
                f"name the pods; whole namespaces are let in by the label {CLIENTS}",
                "/metrics and the API are one port: who may read the one may use the other",
            )


def _head_hears_operator(resource: Resource, every: All) -> Iterator[Broken]:
    """Some policy lets KubeRay's operator to the dashboard, however it was installed."""
    heads = {id(pod) for pod in selected(resource["spec"].get("podSelector") or {}, every) if pod.role == "head"}
    for index, rule in enumerate(resource["spec"].get("ingress") or ()):
        ports = {port.get("port") for port in rule.get("ports") or ()}
        if not heads or DASHBOARD not in ports:
            continue
        admitted = {value for peer in rule.get("from") or () for value in label_values(peer.get("podSelector"), APP)}
        if missing := OPERATORS - admitted:
            yield Broken(
                f"spec.ingress[{index}].from",
                f"no pods with {APP}: {' or '.join(sorted(missing))}",
                f"let in {' and '.join(sorted(OPERATORS))} at {DASHBOARD}",
                "KubeRay labels its operator by the way it was installed; without it Serve gets no settings",
            )


def _egress(resource: Resource, _all: All) -> Iterator[Broken]:
    spec = resource["spec"]
    if annotations_of(resource).get(EGRESS_BECAUSE, "").strip():
        return
    for index, rule in enumerate(spec.get("egress") or ()):
        blocks = {peer["ipBlock"]["cidr"] for peer in rule.get("to") or () if "ipBlock" in peer}
        if not rule.get("to") or any(map(is_everybody, blocks)):
            yield Broken(
                f"spec.egress[{index}].to",
                "anywhere",
                f"name addresses or pods, or the annotation {EGRESS_BECAUSE} say for what",
                "what breaks out of a model's code would find the Internet open",
            )


def _is_closed(resource: Resource, every: All) -> Iterator[Broken]:
    """All Ray pods of a service have policies for both ways."""
    policies = every.of_kind("NetworkPolicy")
    for pod in every.pods:
        if pod.owner != name_of(resource) or not is_ray(pod):
            continue
        kinds = {
            kind
            for policy in policies
            if pod in selected(policy["spec"].get("podSelector") or {}, every)
            for kind in policy["spec"].get("policyTypes") or ("Ingress",)
        }
        if missing := {"Ingress", "Egress"} - kinds:
            yield Broken(
                f"{pod.path}.metadata.labels",
                f"no NetworkPolicy here is for this pod's {' and '.join(sorted(missing))}",
                "have the labels that the policies select",
                "who reaches Ray's ports runs code there",
            )


def way_out(pod: Pod, port: int, every: All) -> bool:
    """Whether a pod may reach addresses outside of the cluster at a port."""
    closed = False
    for policy in every.of_kind("NetworkPolicy"):
        spec = policy["spec"]
        if "Egress" not in (spec.get("policyTypes") or ()) or pod not in selected(spec.get("podSelector") or {}, every):
            continue
        closed = True
        for rule in spec.get("egress") or ():
            outside = not rule.get("to") or any("ipBlock" in peer for peer in rule["to"])
            ports = [each.get("port") for each in rule.get("ports") or ()]
            if outside and (not ports or port in ports or None in ports):
                return True
    return not closed


def _head_asks_the_api_server(resource: Resource, every: All) -> Iterator[Broken]:
    for pod in every.pods:
        if pod.owner == name_of(resource) and pod.autoscaled and not way_out(pod, 443, every):
            yield Broken(
                f"{pod.path}.metadata.labels",
                "no NetworkPolicy here lets the autoscaler to the API server",
                "be let out at 443 to its address",
                "it could ask for no pods",
            )


def _reads_a_service(resource: Resource, every: All) -> Iterator[Broken]:
    wanted = resource["spec"]["selector"].get("matchLabels") or {}
    services = [s for s in every.of_kind("Service") if wanted.items() <= labels_of(s).items()]
    there = {port.get("name") for service in services for port in service["spec"].get("ports") or ()}
    for index, endpoint in enumerate(resource["spec"]["endpoints"]):
        if endpoint.get("port") not in there:
            yield Broken(
                f"spec.endpoints[{index}].port",
                str(endpoint.get("port")),
                f"be a port of a Service that it selects: {_listed(there)}",
                "Prometheus would find nothing",
            )


def _reads_pods(resource: Resource, every: All) -> Iterator[Broken]:
    pods = selected(resource["spec"]["selector"], every)
    if not pods:
        yield Broken("spec.selector", "selects no pod", "select a pod that is here", "Prometheus would find nothing")
    for index, endpoint in enumerate(resource["spec"].get("podMetricsEndpoints") or ()):
        path = f"spec.podMetricsEndpoints[{index}].port"
        for pod in pods:
            numbers = {port["containerPort"] for port in _ports(pod) if port.get("name") == endpoint.get("port")}
            if numbers and not any(_admits(policy, pod, numbers, every) for policy in every.of_kind("NetworkPolicy")):
                yield Broken(
                    path,
                    f"{endpoint.get('port')} of {pod.owner} {pod.path}, which no NetworkPolicy opens",
                    "be a port that Prometheus is let in to",
                    "it would be refused",
                )
        there = {port.get("name") for pod in pods for port in _ports(pod)}
        if pods and endpoint.get("port") not in there:
            yield Broken(
                path, str(endpoint.get("port")), f"be one of {_listed(there)}", "Prometheus would find nothing"
            )


def _admits(policy: Resource, pod: Pod, numbers: set[int], every: All) -> bool:
    if pod not in selected(policy["spec"].get("podSelector") or {}, every):
        return False
    return any(
        {port.get("port") for port in rule.get("ports") or ()} & numbers
        and any("namespaceSelector" in peer for peer in rule.get("from") or ())
        for rule in policy["spec"].get("ingress") or ()
    )


RAY_RULES = (_is_closed, _head_asks_the_api_server)
SERVICE_RULES = (selects_somebody, _ports_are_there)
POLICY_RULES = (selects_somebody, _opens_to_named, _head_hears_operator, _egress)
MONITOR_RULES = (_reads_a_service,)
POD_MONITOR_RULES = (_reads_pods,)
