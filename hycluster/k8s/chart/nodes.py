"""Manifests with holes: mappings and lists in which a template's expression may stand for a value, and their text.

A manifest is what PyYAML reads. The classes here stand in it where Helm is to fill in something; :func:`text` writes
the whole as a template. What comes from the manifests themselves is never taken for a template's expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml


class Nothing(Enum):
    """No value, not even null; a copy of it is itself."""

    GONE = "gone"


GONE = Nothing.GONE


@dataclass(frozen=True)
class Scalar:
    """A value on one line: a pipeline's result as JSON, which YAML reads as what it is and never as something else."""

    pipeline: str


@dataclass(frozen=True)
class Block:
    """A mapping or list that a pipeline gives."""

    pipeline: str


@dataclass(frozen=True)
class IfAny:
    """As :class:`Block`; where the pipeline gives nothing (``""``, ``[]``, ``{}``), its key is left out.

    As an item of a list, or as a key: all items, or entries, that the pipeline gives.
    """

    pipeline: str


@dataclass(frozen=True)
class Lines:
    """A text of several lines that a pipeline gives."""

    pipeline: str


@dataclass(frozen=True)
class When:
    """A value, or a list's item, that is there if a condition holds; else ``otherwise``, or nothing."""

    condition: str
    then: Any
    otherwise: Any = GONE


@dataclass(frozen=True)
class Each:
    """A list's item for everything that is iterated over, such as ``$group := .Values.engines``."""

    over: str
    item: Any


def text(manifest: Any) -> str:
    """A manifest as a template's text."""
    return "".join(f"{line}\n" for line in _lines(manifest, 0))


def _lines(node: Any, indent: int) -> Iterator[str]:
    """A mapping or a list at a column."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _entry(key, value, indent)
    else:
        for item in node:
            yield from _item(item, indent)


def _entry(key: str | Scalar | IfAny, value: Any, indent: int) -> Iterator[str]:
    pad = " " * indent
    if isinstance(key, IfAny):
        yield from _item(key, indent)
        return
    name = f"{{{{ {key.pipeline} | toJson }}}}" if isinstance(key, Scalar) else _scalar(key)
    match value:
        case When():
            yield from _if(value, indent, lambda chosen: _entry(key, chosen, indent))
        case Scalar(pipeline):
            yield f"{pad}{name}: {{{{ {pipeline} | toJson }}}}"
        case Block(pipeline):
            yield f"{pad}{name}:"
            yield f"{pad}  {{{{- toYaml ({pipeline}) | nindent {indent + 2} }}}}"
        case IfAny(pipeline):
            yield f"{pad}{{{{- with {pipeline} }}}}"
            yield f"{pad}{name}:"
            yield f"{pad}  {{{{- toYaml . | nindent {indent + 2} }}}}"
            yield f"{pad}{{{{- end }}}}"
        case Lines(pipeline):
            yield f"{pad}{name}: |"
            yield f"{pad}  {{{{- {pipeline} | nindent {indent + 2} }}}}"
        case dict() | list() if value:
            yield f"{pad}{name}:"
            yield from _lines(value, indent + 2)
        case str() if "\n" in value:
            yield from _several(f"{pad}{name}:", value, indent)
        case _:
            yield f"{pad}{name}: {_scalar(value)}"


def _item(item: Any, indent: int) -> Iterator[str]:
    pad = " " * indent
    match item:
        case When():
            yield from _if(item, indent, lambda chosen: _item(chosen, indent))
        case Each(over, each):
            yield f"{pad}{{{{- range {over} }}}}"
            yield from _item(each, indent)
            yield f"{pad}{{{{- end }}}}"
        case IfAny(pipeline):
            yield f"{pad}{{{{- with {pipeline} }}}}"
            yield f"{pad}{{{{- toYaml . | nindent {indent} }}}}"
            yield f"{pad}{{{{- end }}}}"
        case Scalar(pipeline):
            yield f"{pad}- {{{{ {pipeline} | toJson }}}}"
        case dict() if item and not isinstance(next(iter(item.values())), When | IfAny):
            first, *rest = _lines(item, indent + 2)
            yield f"{pad}- {first.lstrip()}"
            yield from rest
        case dict() if item:
            # Its first key may not be there, so the dash has a line to itself.
            yield f"{pad}-"
            yield from _lines(item, indent + 2)
        case str() if "\n" in item:
            yield from _several(f"{pad}-", item, indent)
        case list() if item:
            raise ValueError(f"a list in a list: {item}")
        case _:
            yield f"{pad}- {_scalar(item)}"


def _several(opening: str, value: str, indent: int) -> Iterator[str]:
    """A text of several lines, as such."""
    yield f"{opening} |{'' if value.endswith(chr(10)) else '-'}"
    for line in value.removesuffix("\n").split("\n"):
        yield f"{' ' * (indent + 2)}{_literal(line)}".rstrip()


def _if(node: When, indent: int, lines: Any) -> Iterator[str]:
    pad = " " * indent
    yield f"{pad}{{{{- if {node.condition} }}}}"
    yield from lines(node.then)
    if node.otherwise is not GONE:
        yield f"{pad}{{{{- else }}}}"
        yield from lines(node.otherwise)
    yield f"{pad}{{{{- end }}}}"


def _scalar(value: Any) -> str:
    """As YAML on one line; of an empty mapping or list, ``{}`` or ``[]``."""
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return _literal(dumped.removesuffix("\n").removesuffix("\n...").rstrip("\n"))


def _literal(text: str) -> str:
    """A text that Helm leaves as it is."""
    return text.replace("{{", '{{ "{{" }}')
