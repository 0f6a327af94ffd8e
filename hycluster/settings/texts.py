"""Which settings are texts: what ``--set`` gives them is taken as it stands, not as YAML."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel


def takes_text(kind: Any, path: Sequence[str]) -> bool:
    """Whether the setting of a dotted key is a text and can be nothing else but null."""
    found = [kind]
    for part in path:
        found = [inner for outer in found for inner in _within(outer, part)]
    choices = [choice for one in found for choice in _choices(one) if choice is not type(None)]
    return bool(choices) and all(_is_text(choice) for choice in choices)


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _choices(kind: Any) -> list[Any]:
    """What a union is of; anything else is its one choice."""
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [choice for one in get_args(kind) for choice in _choices(one)]
    return [kind]


def _within(kind: Any, part: str) -> list[Any]:
    """The types of what has that name, or number, in a setting of this type."""
    found = []
    for choice in _choices(kind):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            field = choice.model_fields.get(part)
            found += [field.annotation] if field else []
        elif dataclasses.is_dataclass(choice):
            hints = get_type_hints(choice)
            found += [hints[part]] if part in hints else []
        elif get_origin(choice) in (list, tuple):
            found += get_args(choice)[:1]
        elif get_origin(choice) is dict:
            found += get_args(choice)[1:]
    return found
