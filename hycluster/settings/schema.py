"""The settings as a JSON schema, for editors and other programs: the models' own, with what their docstrings say."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hycluster.settings.settings import Settings

ID = "https://json-schema.org/draft/2020-12/schema"


# What Python calls by other names than YAML.
_YAML = {"None": "null", "True": "true", "False": "false"}


def settings_schema(kind: type[BaseModel] = Settings) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a kind of settings, each key with its description."""
    made = kind.model_json_schema()
    for each in all_kinds(kind):
        target = made if each is kind else made.get("$defs", {}).get(each.__name__, {})
        target["description"] = summary(each)
        described = descriptions(each)
        for key, value in target.get("properties", {}).items():
            if key in described:
                value["description"] = described[key]
    return {"$schema": ID, **made}


def all_kinds(kind: type) -> list[type]:
    """The kind and all that its fields are made of, in the order in which they are met: models and dataclasses."""
    found = [kind]
    for each in found:
        for annotation, _ in keys(each).values():
            found += [inner for inner in _kinds_in(annotation) if inner not in found]
    return found


def keys(kind: Any) -> dict[str, tuple[Any, Any]]:
    """By key, its annotation and its default; ``PydanticUndefined`` if it must be given."""
    if issubclass(kind, BaseModel):
        return {
            key: (field.annotation, field.get_default(call_default_factory=True))
            for key, field in kind.model_fields.items()
        }
    hints = typing.get_type_hints(kind)
    return {
        field.name: (hints[field.name], PydanticUndefined if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(kind)
    }


def _kinds_in(annotation: Any) -> list[type]:
    if inspect.isclass(annotation) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _kinds_in(part)]


def summary(kind: type) -> str:
    """What a kind of settings is for: its docstring up to the first section, on one line."""
    return _said(re.split(r"\n(?:Attributes|Raises):\n", inspect.getdoc(kind) or "")[0])


def descriptions(kind: type) -> dict[str, str]:
    """By key, what the docstring's ``Attributes`` say, or else what it is made of says.

    ``a, b: text`` describes both.
    """
    text = re.split(r"\nRaises:\n", (inspect.getdoc(kind) or "").partition("Attributes:\n")[2])[0]
    found = {key: summary(inner[0]) for key, (annotation, _) in keys(kind).items() if (inner := _kinds_in(annotation))}
    for entry in re.split(r"\n(?=    \S)", "\n" + text):
        names, colon, said = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), _said(said))
    return found


def _said(text: str) -> str:
    return re.sub(r"\b(?:None|True|False)\b", lambda word: _YAML[word[0]], " ".join(text.split()))
