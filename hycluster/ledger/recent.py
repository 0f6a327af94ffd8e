"""The ledger's last day for whoever looks at it again and again: each of its parts is read once, and kept as sums."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from hycluster.ledger.books import Books, LedgerPart
from hycluster.ledger.entry import COST
from hycluster.ledger.usage import SUMMED, UsageSum, sum_tables

MINUTE_S = 60


class RecentUsage:
    """Blocks, and is asked by one thread at a time."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._parts: dict[tuple[str, str], pa.Table] = {}

    def by_project(self, spans_s: Sequence[int], now: float) -> list[list[UsageSum]]:
        """By tenant and project, what they have had within each of the spans until now; to the minute.

        Args:
            now: seconds since the epoch.

        Raises:
            OSError: the ledger can't be read.
        """
        seen: dict[tuple[str, str], pa.Table] = {}

        def read(day: str, part: LedgerPart) -> pa.Table:
            if (day, part.path) not in seen:
                known = self._parts.get((day, part.path))
                seen[day, part.path] = condensed(self._books.read(day, part)) if known is None else known
            return seen[day, part.path]

        tables = list(self._books.tables(now - max(spans_s), read=read))
        self._parts = seen
        return [sum_tables(tables, ["tenant", "project"], since=now - span_s) for span_s in spans_s]


def condensed(table: pa.Table) -> pa.Table:
    """A part's entries, summed by project and minute. Of each minute the last end is told; lines of which only the last
    one counts stay apart, as others may be in other parts."""
    minute = pc.divide(pc.cast(pc.floor(table.column("ended_at")), pa.int64()), MINUTE_S)
    names = ["tenant", "project", "once"]
    summed = (
        table.append_column("minute", minute)
        .group_by([*names, "minute"])
        .aggregate([("ended_at", "max"), *((column, "sum") for column in SUMMED)])
    )
    columns = {name: summed.column(name) for name in names}
    columns |= {"ended_at": summed.column("ended_at_max")}
    columns |= {name: summed.column(f"{name}_sum") for name in SUMMED}
    return pa.table(columns | {"cost": pc.cast(columns["cost"], COST)})
