"""``values.yaml`` and the README, from what :mod:`hycluster.k8s.chart.values` says of each value."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hycluster.k8s.chart.values import Chart, Values

WIDTH = 120


def values_yaml(given: dict[str, Any]) -> str:
    """The chart's defaults, each with its comment.

    Args:
        given: of values that have no default of their own.
    """
    head = "# Made by 'hycluster k8s render'. One release a namespace: names in it are fixed."
    return "\n".join([head, *_entries(Chart, given, 0)]) + "\n"


def readme() -> str:
    """The chart's README: what to do first, and a table of all values."""
    environment = Environment(
        loader=PackageLoader(__package__), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("README.md.jinja").render(values=_named(Chart, ""))


def key(name: str, field: FieldInfo) -> str:
    return field.alias or name


def _entries(kind: type[BaseModel], given: dict[str, Any], indent: int) -> Iterator[str]:
    pad = " " * indent
    for name, field in kind.model_fields.items():
        label = key(name, field)
        yield from ("" for _ in range(indent == 0))
        yield from textwrap.wrap(
            field.description or "", WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# "
        )
        value = given.get(label, field.get_default(call_default_factory=True))
        inner = _class(field.annotation)
        if isinstance(value, BaseModel):
            value = value.model_dump(by_alias=True)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Values):
            yield f"{pad}{label}:"
            yield from _entries(field.annotation, value, indent + 2)
        elif inner is not None and value:
            yield f"{pad}{label}:"
            for item in value:
                yield f"{pad}  -"
                yield from _entries(inner, item, indent + 4)
        else:
            yield from _dumped(label, value, indent)


def _class(annotation: Any) -> type[Values] | None:
    """The class within ``tuple[X, ...]``."""
    for inner in get_args(annotation):
        if isinstance(inner, type) and issubclass(inner, Values):
            return inner
    return None


def _dumped(label: str, value: Any, indent: int) -> Iterator[str]:
    plain = list(value) if isinstance(value, tuple) else value
    short = yaml.safe_dump(
        {label: plain}, default_flow_style=not plain and isinstance(plain, dict | list), width=WIDTH, sort_keys=False
    )
    text = f"{label}: {{}}" if plain == {} else f"{label}: []" if plain == [] else short.rstrip("\n")
    yield from textwrap.indent(text, " " * indent).split("\n")


def _named(kind: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in kind.model_fields.items():
        label = f"{prefix}{key(name, field)}"
        yield label, field.description or ""
        inner = _class(field.annotation)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Values):
            yield from _named(field.annotation, f"{label}.")
        elif inner is not None and inner.__name__ != "Toleration":
            yield from _named(inner, f"{label}[].")
