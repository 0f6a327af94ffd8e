"""What it takes to validate a request goes by how much is in it, and not by all that each part of it might have been.

pydantic goes on to the end of a list of which an element is wrong, and tells of each by every kind that it might
have been: an item of the Responses API might be one of some thirty, so nine kilobytes, three thousand ``{}``, took four
seconds and 700,000 errors, in which nothing else ran in the ingress process. Callers are told the first ten. It also
tries an element that is right as each of the thirty, although its ``type`` says what it is.

Reaches into FastAPI's routes for what validates their bodies (``ModelField._type_adapter``), as there is no setting for
it; ``tests/ingress/test_first_wrong.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator
from starlette.routing import BaseRoute

from hycluster.core import MAX_TOOLS
from hycluster.errors import too_many_members
from hycluster.ingress.json_shape import members_of_text
from hycluster.settings.load import MAX_MEMBERS

_LISTS = ("list", "tuple", "set", "frozenset")
_TYPE = "type"
# Tags that no type has: of what has none, and of what has one that none of the kinds has.
_UNTYPED, _OTHER = "without a type", "of any type"
# A union that says more has an order of its own, or words.
_PLAIN = {"type", "choices", "ref", "metadata", "strict", "serialization"}
# With fewer kinds there is nothing to gain.
_MANY = 4


def quick_to_validate(routes: Iterable[BaseRoute], max_members: int = MAX_MEMBERS) -> None:
    """Have routes refuse a list by its first wrong element, and more tools than there may be, and look at what an
    element says that it is before they look what it might be.

    Args:
        max_members: of the JSON in a request's calls of tools, together.
    """
    for route in routes:
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                adapter: TypeAdapter[Any] = field._type_adapter
                # Models within are built again: those that there are go on to the end.
                schema = _quick(adapter.core_schema, _definitions(adapter.core_schema))
                validator: Any = _Bounded(SchemaValidator(schema, _use_prebuilt=False), max_members)
                adapter.validator = validator


class _Bounded:
    """A validator that looks first at what is JSON once more: the arguments of calls, as text, which vLLM reads."""

    def __init__(self, validator: SchemaValidator, most: int) -> None:
        self._validator = validator
        self._most = most

    def validate_python(self, body: Any, **options: Any) -> Any:
        """As pydantic's validators have it."""
        if sum(members_of_text(text.encode(errors="replace"), self._most) for text in _arguments(body)) > self._most:
            raise too_many_members("arguments", self._most)
        return self._validator.validate_python(body, **options)


def _arguments(body: Any) -> Iterator[str]:
    for turn in _dicts(body, "messages"):
        for call in _dicts(turn, "tool_calls"):
            yield from _text(call.get("function"))
    for item in _dicts(body, "input"):
        yield from _text(item)


def _dicts(holder: Any, name: str) -> Iterator[dict[str, Any]]:
    listed = holder.get(name) if isinstance(holder, dict) else None
    # One that is of another kind is refused, and what is behind it not read.
    return takewhile(lambda each: isinstance(each, dict), listed if isinstance(listed, list) else ())


def _text(call: Any) -> Iterator[str]:
    if isinstance(call, dict) and isinstance(text := call.get("arguments"), str):
        yield text


def _quick(schema: Any, known: Mapping[str, Any]) -> Any:
    """A copy of pydantic's schema, or of a part of it."""
    if isinstance(schema, dict):
        copied = {key: _quick(value, known) for key, value in schema.items()}
        fields = copied.get("fields")
        if isinstance(fields, dict) and "tools" in fields:
            _bound(fields["tools"])
        if copied.get("type") in _LISTS:
            return {**copied, "fail_fast": True}
        if _is_plain(copied):
            return _by_type([_quick(choice, known) for choice in _flat(schema)], copied, known)
        return copied
    if isinstance(schema, (list, tuple)):
        return type(schema)(_quick(each, known) for each in schema)
    return schema


def _bound(schema: dict[str, Any]) -> None:
    while schema.get("type") != "list":
        if not isinstance(schema := schema.get("schema", {}), dict) or not schema:
            return
    schema["max_length"] = MAX_TOOLS


def _by_type(choices: Sequence[dict[str, Any]], union: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The same choice in two steps: what has a type is tried as those kinds only that may have it.

    Args:
        choices: the union's, and those of unions among them.
    """
    kinds = [_types(choice, known) for choice in choices]
    types = {each for allowed, _ in kinds for each in allowed or ()}
    if len(choices) < _MANY or not types or not all(isinstance(each, str) for each in types):
        return union

    def of(tag: str | None) -> dict[str, Any]:
        able = [
            choice
            for choice, (allowed, optional) in zip(choices, kinds, strict=True)
            if allowed is None or (optional if tag is None else tag in allowed)
        ]
        return {"type": "union", "choices": able} if len(able) > 1 else able[0]

    tags = {each: of(each) for each in types} | {_OTHER: {"type": "union", "choices": choices}}
    if any(allowed is None or optional for allowed, optional in kinds):
        tags[_UNTYPED] = of(None)

    all_named = all(allowed is not None for allowed, _ in kinds)

    def tag_of(value: Any) -> str:
        named = value.get(_TYPE) if isinstance(value, dict) else getattr(value, _TYPE, _OTHER)
        if named is None:
            return _UNTYPED if _UNTYPED in tags else _OTHER
        # One that is none's is told with all that there are.
        return named if isinstance(named, str) and (named in tags or all_named) else _OTHER

    # Callers are told that it was found by this.
    tag_of.__name__ = _TYPE
    kept = {key: value for key, value in union.items() if key in ("ref", "metadata", "strict")}
    return {"type": "tagged-union", "choices": tags, "discriminator": tag_of, **kept}


def _is_plain(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "union" and schema.keys() <= _PLAIN


def _flat(union: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for choice in union["choices"]:
        kind = choice[0] if isinstance(choice, tuple) else choice
        if _is_plain(kind):
            yield from _flat(kind)
        else:
            yield kind


def _types(schema: Any, known: Mapping[str, Any]) -> tuple[frozenset[Any] | None, bool]:
    """The types that a kind may have, None if any or none, and whether it may be left out."""
    while isinstance(schema, dict) and "fields" not in schema:
        schema = known.get(schema["schema_ref"]) if schema["type"] == "definition-ref" else schema.get("schema")
    field = schema["fields"].get(_TYPE) if isinstance(schema, dict) and isinstance(schema["fields"], dict) else None
    if field is None:
        return None, True
    optional, inner = field.get("required") is False, field["schema"]
    while inner["type"] in ("default", "nullable"):
        optional, inner = True, inner["schema"]
    return (frozenset(inner["expected"]), optional) if inner["type"] == "literal" else (None, True)


def _definitions(schema: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(schema, dict):
        if isinstance(schema.get("ref"), str):
            found[schema["ref"]] = schema
        schema = list(schema.values())
    if isinstance(schema, (list, tuple)):
        for each in schema:
            found |= _definitions(each)
    return found
