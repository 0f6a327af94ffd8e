"""Sums of the ledger, by whose and of what, and by spans of time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from hycluster.ledger.books import Books
from hycluster.ledger.entry import SCHEMA

# ``day`` is UTC's, ``operation`` as an entry has it, a key is told by its id.
Dimension = Literal["tenant", "project", "key", "model", "day", "tier", "operation", "outcome"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
SUMMED = ("requests", "input_tokens", "cached_tokens", "output_tokens", "cost")


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What a group has had.

    Attributes:
        group: by dimension, its value; with ``key`` also ``key_name``.
        start_at: begin of its span of time, in seconds since the epoch; None where all time is one.
        cached_tokens: those of ``input_tokens`` that were in the KV cache.
        cost: in ``auth.currency``.
    """

    group: dict[str, str]
    start_at: int | None
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost: Decimal


def sum_usage(
    books: Books,
    by: Sequence[Dimension] = (),
    *,
    since: float | None = None,
    until: float | None = None,
    bucket_s: int | None = None,
    only: Mapping[Dimension, Collection[str]] | None = None,
) -> list[UsageSum]:
    """Add up, in the order of time and of the groups' values. Blocks; groups that have had nothing are not there.

    What other machines have not committed yet (``ledger.cut_every_s``) is not among it; what this one has not, is.

    Args:
        books: see :func:`hycluster.ledger.books.books_of`.
        since, until: when requests ended, in seconds since the epoch; from the first on, before the second.
        bucket_s: length of the spans; they begin at multiples of it. None: all time is one.
        only: by dimension, the values that count.

    Raises:
        OSError: the ledger can't be read.
    """
    return sum_tables(books.tables(since, until), by, since=since, until=until, bucket_s=bucket_s, only=only)


def sum_tables(
    tables: Iterable[pa.Table],
    by: Sequence[Dimension] = (),
    *,
    since: float | None = None,
    until: float | None = None,
    bucket_s: int | None = None,
    only: Mapping[Dimension, Collection[str]] | None = None,
) -> list[UsageSum]:
    """The same of entries that are here; of columns that are not asked for none has to be there."""
    table = pa.concat_tables([SCHEMA.empty_table(), *tables], promote_options="default")
    table = _last_of_each(table)
    ended = table.column("ended_at")
    seconds = pc.cast(pc.floor(ended), pa.int64())
    table = table.append_column("day", pc.strftime(pc.cast(seconds, pa.timestamp("s")), format="%Y-%m-%d"))
    if bucket_s is not None:
        # Integers are divided towards zero, and no request is from before 1970.
        table = table.append_column("start_at", pc.multiply(pc.divide(seconds, bucket_s), bucket_s))
    last = float("inf") if until is None else until
    chosen = pc.and_(pc.greater_equal(ended, since or 0.0), pc.less(ended, last))
    for name, values in (only or {}).items():
        chosen = pc.and_(chosen, pc.is_in(table.column(name), pa.array(sorted(values), pa.string())))
    names = [*(["start_at"] if bucket_s is not None else []), *by, *(["key_name"] if "key" in by else [])]
    summed = table.filter(chosen).group_by(names).aggregate([(column, "sum") for column in SUMMED])
    rows = summed.to_pylist()
    if not names:
        rows = [row for row in rows if row["requests_sum"] is not None]
    found = [_sum_of(row, names) for row in rows]
    return sorted(found, key=lambda each: (each.start_at or 0, list(each.group.values())))


def _last_of_each(table: pa.Table) -> pa.Table:
    """Without the lines of answers that were begun again."""
    once, ended = table.column("once"), table.column("ended_at")
    marked = pc.indices_nonzero(pc.not_equal(once, "")).to_pylist()
    if not marked:
        return table
    last: dict[str, int] = {}
    for index in sorted(marked, key=lambda index: ended[index].as_py()):
        last[once[index].as_py()] = index
    dropped = pa.array(sorted(set(marked) - set(last.values())), pa.int64())
    return table.filter(pc.invert(pc.is_in(pa.array(range(table.num_rows), pa.int64()), dropped)))


def _sum_of(row: Mapping[str, Any], names: Sequence[str]) -> UsageSum:
    group = {name: row[name] for name in names if name != "start_at"}
    return UsageSum(group, row.get("start_at"), **{name: row[f"{name}_sum"] for name in SUMMED})
