"""What no schema, regex or grammar may say, whoever compiles it: counts out of all proportion, and ``$ref`` that lead
nowhere but back.

A count costs an engine, and whoever checks it before, time and memory in proportion; a cycle of references passes every
check, and fails in the engine alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from hycluster.errors import InvalidInput, shown

COUNTS = frozenset(
    {
        "minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains",
        "maxContains",
    }
)  # fmt: skip
# Their values are data, whatever they look like.
_DATA = frozenset({"const", "enum", "default", "examples", "example"})
# Beneath them a property may be called "default", or "minItems".
_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
# A schema and these, or what they hold, are satisfied by one and the same value.
_SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")
# {n}, {n,} and {n,m}; and Lark's ~ n and ~ n..m. What is taken is not given back, so that it takes time in proportion
# to the text: while it is searched, nothing else in the process runs.
_REPEATS = re.compile(r"\{\s*+(\d++)\s*+(?:,\s*+(\d*+)\s*+)?+\}|~\s*+(\d++)(?:\s*+\.\.\s*+(\d++))?")
# vLLM's own bound is 64, and 16 more for what wraps the schemas of tools.
_MAX_NESTING = 100
# Of where it is: names of properties have any length.
_SHOWN = 300


def check_counts(kind: str, spec: str, most: int) -> None:
    """Refuse what can be seen to be out of bounds without compiling it.

    Args:
        kind: the field of ``structured_outputs``.
        spec: its value, as JSON where it is not text.

    Raises:
        InvalidInput: names the place, the value and what is allowed.
    """
    field = f"structured_outputs.{kind}"
    if kind in ("json", "structural_tag"):
        try:
            schema = json.loads(spec)
        except (ValueError, RecursionError):
            return  # vLLM says so
        _check_schema(field, schema, most)
    elif kind in ("regex", "grammar"):
        _check_repeats(field, spec, most)


def _check_schema(field: str, schema: Any, most: int) -> None:
    for path, value in _subschemas(schema):
        if not isinstance(value, dict):
            continue
        for key, bound in value.items():
            place = f"{field}: #{path}/{key}"[:_SHOWN]
            if key in COUNTS and isinstance(bound, (int, float)) and bound > most:
                raise InvalidInput(f"{place}: {shown(bound)} is not allowed; at most {most}")
            if key in ("pattern", "regex") and isinstance(bound, str):
                _check_repeats(place, bound, most)
            if key == "patternProperties" and isinstance(bound, dict):
                for pattern in bound:
                    _check_repeats(place, pattern, most)
    _check_references(field, schema)


def _check_repeats(place: str, text: str, most: int) -> None:
    for match in _REPEATS.finditer(text):
        for number in match.groups():
            # A number of a thousand digits takes its time to be read as one.
            if number and (len(number) > len(str(most)) + 10 or int(number) > most):
                raise InvalidInput(f"{place}: {shown(match[0])} is not allowed; counts are at most {most}")


def _subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """All there is within, and where; what is data aside, and what is deeper than vLLM lets pass."""
    # With how deep it is, and whether its keys are names of a caller's choosing.
    waiting: list[tuple[str, int, bool, Any]] = [("", 0, False, schema)]
    while waiting:
        path, depth, named, value = waiting.pop()
        yield path, value
        if depth > _MAX_NESTING:
            continue
        if isinstance(value, dict):
            for key, child in value.items():
                if named or key not in _DATA:
                    waiting.append((_below(path, key), depth + 1, not named and key in _NAMED, child))
        elif isinstance(value, list):
            waiting.extend((_below(path, place), depth + 1, False, child) for place, child in enumerate(value))


def _below(path: str, key: object) -> str:
    """No longer than it is shown: each of ten thousand items would have a copy of the long name that they are under."""
    return path if len(path) >= _SHOWN else f"{path}/{key}"[:_SHOWN]


def _check_references(field: str, schema: Any) -> None:
    """Refuse a schema that is its own condition: it never says what it asks of a value.

    Raises:
        InvalidInput
    """
    references = {
        value["$ref"]
        for _, value in _subschemas(schema)
        if isinstance(value, dict) and isinstance(value.get("$ref"), str)
    }
    done: set[str] = set()
    passed: set[str] = set()
    # What one place asks for, by its identity: it has as many names as there are ways to write it with %.
    known: dict[int, list[str]] = {}

    def conditions(reference: str) -> Iterator[str]:
        target = _resolve(schema, reference)
        if id(target) not in known:
            known[id(target)] = _conditions(target)
        return iter(known[id(target)])

    for begin in references:
        # Depth first; a reference that is met again on its own way is a cycle.
        way: list[tuple[str, Iterator[str]]] = [(begin, conditions(begin))]
        passed.add(begin)
        while way:
            reference = next(way[-1][1], None)
            if reference is None:
                left = way.pop()[0]
                passed.discard(left)
                done.add(left)
            elif reference in passed:
                raise InvalidInput(
                    f"{field}: $ref {shown(reference)} leads back to itself, and to no schema; not allowed"
                )
            elif reference not in done:
                way.append((reference, conditions(reference)))
                passed.add(reference)


def _conditions(schema: Any) -> list[str]:
    """References that a value must satisfy, or may, so that it satisfies this schema."""
    found: list[str] = []
    waiting = [schema]
    while waiting:
        target = waiting.pop()
        if not isinstance(target, dict):
            continue
        if isinstance(target.get("$ref"), str):
            found.append(target["$ref"])
        for key in _SAME_VALUE:
            child = target.get(key)
            waiting.extend(child if isinstance(child, list) else [child])
    return found


def _resolve(schema: Any, reference: str) -> Any:
    """What a JSON pointer within the schema points at; None if that is nothing, or elsewhere."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    target = schema
    for part in unquote(reference[2:]).split("/") if len(reference) > 1 else ():
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict):
            target = target.get(key)
        elif isinstance(target, list) and key.isdigit() and len(key) < 10 and int(key) < len(target):
            target = target[int(key)]
        else:
            return None
    return target
