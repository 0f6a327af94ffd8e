"""The settings as a JSON schema, for editors and other programs: the models' own, with what their docstrings say."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

from hycluster.settings.settings import Settings

ID = "https://json-schema.org/draft/2020-12/schema"


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


def all_kinds(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """The kind and all that its fields are made of, in the order in which they are met."""
    found: list[type[BaseModel]] = [kind]
    for each in found:
        for field in each.model_fields.values():
            found += [inner for inner in _models_in(field.annotation) if inner not in found]
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def summary(kind: type[BaseModel]) -> str:
    """What a kind of settings is for: its docstring without the attributes, on one line."""
    text = inspect.getdoc(kind) or ""
    return " ".join(text.partition("\nAttributes:")[0].split())


def descriptions(kind: type[BaseModel]) -> dict[str, str]:
    """By key, what the docstring's ``Attributes`` say; ``a, b: text`` describes both."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + text):
        names, colon, said = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(said.split()))
    return found
