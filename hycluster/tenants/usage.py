"""``hycluster usage``: who has had how much of what, from the ledger."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hycluster.errors import InvalidInput, Unavailable, shown
from hycluster.tenants.acted_on import Config, is_ledger_off, ledger_of
from hycluster.tenants.printed import AsJson, typed_span_s
from hycluster.terminal import console, echo

if TYPE_CHECKING:
    from hycluster.ledger.usage import Dimension, UsageSum

BY = ("tenant", "project", "key", "model", "day", "tier")
_COLUMNS = ("requests", "input_tokens", "cached_tokens", "output_tokens", "cost")


def print_usage(
    by: Annotated[
        str, typer.Option("--by", metavar="GROUPS", help="Of what sums are told, with commas: tenant, project, key,"
                          " model, day (UTC), tier (online or batch).")
    ] = "project,model",
    since: Annotated[
        str | None, typer.Option(metavar="D", help="A span such as 12h or 30d, or a day: 2026-01-31. Default: always.")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Sum up the usage ledger: requests, tokens in, cached and out, and what they cost by the models' prices."""
    from hycluster.ledger.usage import sum_usage

    groups, since_s, books = _groups(by), None if since is None else _since(since), ledger_of(config)
    try:
        found = sum_usage(books, groups, since=since_s)
    except OSError as error:
        from hycluster.storage import masked_line

        raise Unavailable(f"ledger.store: {books.folder.masked} can't be read: {masked_line(error)}") from None
    if not found:
        off = "; the ledger is off, so nothing is written down: set ledger.enabled, or auth.enabled"
        span = "" if since is None else f" since {since}"
        echo(f"no request{span} is in {books.folder.masked}{off if is_ledger_off(config) else ''}", err=True)
    if as_json:
        echo(json.dumps([_as_json(each) for each in found], indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    names = list(found[0].group) if found else by.split(",")
    for name in names:
        table.add_column(name, overflow="fold")
    for name in _COLUMNS:
        table.add_column(name.replace("_", " "), justify="right")
    for each in found:
        table.add_row(*each.group.values(), *(_figure(getattr(each, name)) for name in _COLUMNS))
    console().print(table)


def _figure(amount: int | Decimal) -> str:
    # Costs are kept to twelve places: without the noughts at their ends.
    return f"{amount:,}" if isinstance(amount, int) else f"{amount.normalize():,f}"


def _as_json(each: UsageSum) -> dict[str, Any]:
    return {**each.group, **{name: getattr(each, name) for name in _COLUMNS}, "cost": float(each.cost)}


def _groups(said: str) -> list[Dimension]:
    from hycluster.ledger.usage import DIMENSIONS

    names = [name.strip() for name in said.split(",") if name.strip()]
    for name in names:
        if name not in BY:
            raise InvalidInput(f"--by: {shown(name)} is not allowed; must be of {', '.join(BY)}")
    return [each for name in dict.fromkeys(names) for each in DIMENSIONS if each == name]


def _since(said: str) -> float:
    """Seconds since the epoch."""
    try:
        return datetime.strptime(said, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return time.time() - typed_span_s("--since", said, "a day (2026-01-31), or ")
