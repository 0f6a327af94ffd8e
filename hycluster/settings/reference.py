"""``docs/settings.md`` and ``docs/jobs.md``: every key of the settings and of a job, made from the models and their
docstrings."""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hycluster.settings.schema import all_kinds, descriptions, keys, settings_schema, summary
from hycluster.settings.settings import Settings

HEAD = """# All settings

Made by `hycluster settings reference` from the code; a test compares. `hycluster settings schema` prints the same as a
JSON schema. With `# yaml-language-server: $schema=FILE` in the first line of a settings file, editors complete and
check its keys.

Unknown keys are refused. `--set a.b.c=VALUE` changes one key of a file; numbers index into lists (`models.0.name`).
"""

JOB_HEAD = """# All keys of a job

Made by `hycluster settings reference --job` from the code; a test compares. `hycluster settings schema --job` prints
the same as a JSON schema.

Unknown keys are refused. `--set a.b=VALUE` changes one key of a file; `--input`, `--output` and `--engine` stand for
`input.path`, `output.path` and `engine`.
"""


def reference_page(kind: type[BaseModel] = Settings, head: str = HEAD) -> str:
    """The page, in Markdown."""
    schema = settings_schema(kind)
    sections = [_section(each, schema if each is kind else schema["$defs"][each.__name__]) for each in all_kinds(kind)]
    return "\n".join([head, *sections])


def _section(kind: type, described: dict[str, Any]) -> str:
    lines = [
        f"## {kind.__name__}",
        "",
        _as_markdown(summary(kind)),
        "",
        "| key | type | default | what |",
        "|---|---|---|---|",
    ]
    said = descriptions(kind)
    for key, (_, default) in keys(kind).items():
        kind_of = _type(described["properties"][key])
        lines.append(f"| `{key}` | {kind_of} | {_default(default)} | {_as_markdown(said.get(key, ''))} |")
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
    found = [f"{sign} {described[name]}" for name, sign in signs.items() if name in described]
    return f" {', '.join(found)}" if found else ""


def _default(default: Any) -> str:
    if default is PydanticUndefined:
        return "**required**"
    if isinstance(default, BaseModel) or dataclasses.is_dataclass(default):
        return "its defaults"
    if default is None:
        return "`null`"
    if default in ((), {}):
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{Decimal(str(default)):f}`" if isinstance(default, float) else f"`{default}`"


def _as_markdown(text: str) -> str:
    return re.sub(r"``", "`", text).replace("|", "\\|")
