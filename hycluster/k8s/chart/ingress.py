"""Ingresses to the ingress, with the paths of the routes that ``k8s/components/gateway-routes`` has for a Gateway."""

from __future__ import annotations

import copy
from typing import Any

from hycluster.k8s.chart.nodes import Block, Each, IfAny, Scalar, When

# Of a path's match, by the Gateway API's name.
PATH_TYPES = {"PathPrefix": "Prefix", "Exact": "Exact"}


def ingresses(routes: list[dict[str, Any]], policies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each route, and the policy that lets the controller in.

    A controller must be told by an annotation of the whole Ingress that what is behind it speaks gRPC.

    Args:
        policies: those that let a Gateway in.
    """
    (policy,) = copy.deepcopy(policies)
    policy["metadata"]["name"] = "hycluster-ingress-controller"
    return [*map(_ingress, routes), policy]


def _ingress(route: dict[str, Any]) -> dict[str, Any]:
    grpc = route["kind"] == "GRPCRoute"
    hosts = f"$.Values.hosts.{'grpc' if grpc else 'http'}"
    annotations = "$.Values.ingress.annotations"
    if grpc:
        annotations = f"merge (deepCopy $.Values.ingress.grpcAnnotations) {annotations}"
    paths = [
        {
            "path": path,
            "pathType": kind,
            "backend": {"service": {"name": backend["name"], "port": {"number": backend["port"]}}},
        }
        for rule in route["spec"]["rules"]
        for match in rule["matches"]
        for path, kind in [_path(match)]
        for backend in rule["backendRefs"]
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": "hycluster-grpc" if grpc else "hycluster", "annotations": IfAny(annotations)},
        "spec": {
            "ingressClassName": When("$.Values.ingress.className", Scalar("$.Values.ingress.className")),
            "tls": When(
                "$.Values.ingress.tlsSecretName",
                [{"hosts": Block(hosts), "secretName": Scalar("$.Values.ingress.tlsSecretName")}],
            ),
            "rules": [Each(f"$host := {hosts}", {"host": Scalar("$host"), "http": {"paths": paths}})],
        },
    }


def _path(match: dict[str, Any]) -> tuple[str, str]:
    if "method" in match:
        return f"/{match['method']['service']}/", "Prefix"
    return match["path"]["value"], PATH_TYPES[match["path"]["type"]]
