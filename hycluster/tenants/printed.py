"""Records of the database as a table or as JSON, and spans of time as one types them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from hycluster.errors import InvalidInput, shown
from hycluster.terminal import console, echo

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_SPAN = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}


def typed_span_s(option: str, said: str, also: str = "") -> int:
    """Seconds of a span such as ``90d``.

    Args:
        also: what else the option takes, for the error.

    Raises:
        InvalidInput: it is none.
    """
    found = _SPAN.fullmatch(said)
    if found is None:
        raise InvalidInput(
            f"{option}: {shown(said)} is not allowed; must be {also}minutes, hours or days: 30m, 12h, 90d"
        )
    return int(found[1]) * _UNIT_S[found[2]]


def utc_minute(at: float) -> str:
    """Of seconds since the epoch."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%MZ")


def print_records(found: Sequence[Any], as_json: bool, columns: tuple[str, ...]) -> None:
    """Dataclasses; times are columns that end with ``_at``."""
    if as_json:
        echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in columns:
        # Ids are given to the next command, so they are whole on the narrowest screen.
        table.add_column(name.removesuffix("_at"), overflow="fold", no_wrap=name == "id")
    for each in found:
        assert is_dataclass(each)
        table.add_row(*(_cell(name, getattr(each, name)) for name in columns))
    console().print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "all" if name == "models" else "-"
    if name == "at" or name.endswith("_at"):
        return utc_minute(value)
    return json.dumps(value) if isinstance(value, dict) else ",".join(value) if isinstance(value, tuple) else str(value)
