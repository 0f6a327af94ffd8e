"""``docs/settings.md``: every key of the settings, made from the models and their docstrings."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hycluster.settings.schema import all_kinds, descriptions, settings_schema, summary
from hycluster.settings.settings import Settings

HEAD = """# All settings

Made by `hycluster settings reference` from the code; a test compares. `hycluster settings schema` prints the same as a
JSON schema. With `# yaml-language-server: $schema=FILE` in the first line of a settings file, editors complete and
check its keys.

Unknown keys are refused. `--set a.b.c=VALUE` changes one key of a file; numbers index into lists (`models.0.name`).
"""


def reference_page() -> str:
    """The page, in Markdown."""
    definitions = settings_schema()["$defs"]
    sections = [_section(kind, definitions.get(kind.__name__, settings_schema())) for kind in all_kinds(Settings)]
    return "\n".join([HEAD, *sections])


def _section(kind: type[BaseModel], described: dict[str, Any]) -> str:
    lines = [
        f"## {kind.__name__}",
        "",
        _as_markdown(summary(kind)),
        "",
        "| key | type | default | what |",
        "|---|---|---|---|",
    ]
    said = descriptions(kind)
    for key, field in kind.model_fields.items():
        kind_of = _type(described["properties"][key])
        lines.append(f"| `{key}` | {kind_of} | {_default(field)} | {_as_markdown(said.get(key, ''))} |")
    return "\n".join([*lines, ""])


def _type(described: dict[str, Any]) -> str:
    if "$ref" in described:
        name = described["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in described:
        return " or ".join(_type(each) for each in described["anyOf"])
    if "enum" in described:
        return " or ".join(f"`{value}`" for value in described["enum"])
    kind: str = described.get("type", "any")
    if kind == "array":
        return f"list of {_type(described['items'])}"
    if kind == "object":
        return "mapping"
    return kind + _bounds(described)


def _bounds(described: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {described[name]:g}" for name, sign in signs.items() if name in described]
    return f" {', '.join(found)}" if found else ""


def _default(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "**required**"
    if isinstance(default, BaseModel):
        return "its own"
    if default is None:
        return "none"
    if default in ((), {}):
        return "empty"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _as_markdown(text: str) -> str:
    return re.sub(r"``", "`", text).replace("|", "\\|")
