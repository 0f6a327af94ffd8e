"""Whether an API server would take a manifest: Kubernetes' own kinds and those that CustomResourceDefinitions bring.

Strict: an unknown field is an error, as for ``kubectl apply --validate=strict``. Custom resources get their defaults
first and their CEL rules last, as on a server.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cel
import kubernetes_validate
from jsonschema import Draft202012Validator

KUBERNETES = "1.37"
# Groups of Kubernetes' own besides those without a dot; in others a kind that has no definition here is not known.
BUILT_IN = ("networking.k8s.io", "rbac.authorization.k8s.io", "scheduling.k8s.io", "storage.k8s.io", "node.k8s.io")
CRDS = Path(__file__).with_name("crds")
Resource = dict[str, Any]


def schema_errors(resource: Resource) -> list[str]:
    """Why an API server refuses this resource."""
    schema = _schemas().get((resource["apiVersion"], resource["kind"]))
    if schema is None:
        return _built_in_errors(resource)
    filled = _with_defaults(schema, copy.deepcopy(resource))
    errors = [f"{error.json_path}: {error.message[:200]}" for error in _validator(_key(resource)).iter_errors(filled)]
    return errors or list(_broken_rules(schema, filled, "$"))


def is_known(resource: Resource) -> bool:
    """Whether there is a definition of the kind here, or must be."""
    group = resource["apiVersion"].rpartition("/")[0]
    return _key(resource) in _schemas() or "." not in group or group in BUILT_IN


def _built_in_errors(resource: Resource) -> list[str]:
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return [f"$: no API server knows a {resource['kind']} of {resource['apiVersion']}"]
    except kubernetes_validate.ValidationError as error:
        return [f"$.{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


def _key(resource: Resource) -> tuple[str, str]:
    return resource["apiVersion"], resource["kind"]


@cache
def _schemas() -> dict[tuple[str, str], Any]:
    """By apiVersion and kind."""
    found = {}
    for file in CRDS.glob("*.json.gz"):
        spec = json.loads(gzip.decompress(file.read_bytes()))["spec"]
        for version in spec["versions"]:
            api_version = f"{spec['group']}/{version['name']}"
            found[api_version, spec["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return found


@cache
def _validator(key: tuple[str, str]) -> Draft202012Validator:
    schema = _closed(_schemas()[key])
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def _closed(schema: Any) -> Any:
    """A JSON schema that knows no other fields than the structural schema names."""
    closed = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        closed["properties"] = {name: _closed(child) for name, child in schema["properties"].items()}
        closed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    elif isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if closed.pop("nullable", False) and "type" in closed:
        closed["type"] = [closed["type"], "null"]
    return closed


def _children(schema: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """Every field or item that there is, with its schema; as (key, schema)."""
    if isinstance(value, dict):
        for name in value:
            child = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(child, dict):
                yield name, child
    elif isinstance(value, list):
        for index in range(len(value)):
            yield index, schema.get("items", {})


def _with_defaults(schema: Any, value: Any) -> Any:
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if "default" in child and name not in value:
                value[name] = copy.deepcopy(child["default"])
    for key, child in _children(schema, value):
        value[key] = _with_defaults(child, value[key])
    return value


def _broken_rules(schema: Any, value: Any, path: str) -> Iterator[str]:
    """CEL rules; those that compare with an earlier version of the resource have none here to compare with."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
            yield f"{path}: {rule.get('message', rule['rule'])}"
    for key, child in _children(schema, value):
        yield from _broken_rules(child, value[key], f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}")
