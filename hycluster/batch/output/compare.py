"""A shard's rows as they came in against a file of the output: what of them is there, and is it unchanged?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from hycluster.batch.input.corpus import REFUSAL, RESULT_COLUMNS, ROW_ID
from hycluster.batch.input.tables import as_parquet, last, pick
from hycluster.batch.output.record import ShardRecord

TOKEN_COLUMNS = ("prompt_tokens", "completion_tokens")
# Row ids that one line names.
MOST_ROWS = 3


def row_differences(
    part: pa.Table, columns: tuple[str, ...], suffix: str, table: pa.Table, seen: Counter[int]
) -> Iterator[str]:
    """How a file of a shard differs from the shard's input rows.

    Args:
        columns: what the job adds to the input's columns and ``row_id``.
        suffix: what the names of all these end with.
        table: the shard's input rows with ``row_id``.
        seen: takes the shard's rows that are in this file.
    """
    inputs = table.select(range(table.schema.get_all_field_indices(ROW_ID)[-1]))
    row_id = f"{ROW_ID}{suffix}"
    for name in (ROW_ID, *columns):
        if part.schema.names.count(f"{name}{suffix}") != 1:
            yield f"must have one column {f'{name}{suffix}'!r}"
    if part.schema.names.count(row_id) != 1 or part.schema.field(row_id).type != pa.string():
        yield f"column {row_id!r} must be string"
        return
    positions = pc.index_in(part.column(row_id), value_set=last(table, ROW_ID).combine_chunks())
    if positions.null_count:
        foreign = part.column(row_id).filter(pc.is_null(positions)).slice(0, MOST_ROWS).to_pylist()
        yield f"{positions.null_count} rows are not of this shard: {', '.join(map(repr, foreign))}"
    found = positions.to_pylist()
    part = pick(part, [place for place, row in enumerate(found) if row is not None])
    rows = [row for row in found if row is not None]
    seen.update(rows)
    if any(later < earlier for earlier, later in pairwise(rows)):
        yield "its rows are not in input order"
    if columns is RESULT_COLUMNS and REFUSAL in table.schema.names:
        answered = part.column(row_id).filter(pc.is_valid(table.column(REFUSAL)).take(pa.array(rows, pa.int64())))
        if len(answered):
            named = ", ".join(answered.slice(0, MOST_ROWS).to_pylist())
            yield f"{len(answered)} rows that can't be read have a result: {named}"
    if part.schema.names[: inputs.num_columns] != inputs.schema.names:
        yield f"its columns are {part.schema.names}; they must begin with the input's, {inputs.schema.names}"
        return
    expected = pick(inputs, rows)
    for index, name in enumerate(inputs.schema.names):
        if not _same(part.column(index), expected.column(index)):
            yield f"column {name!r} is not the input's"


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Whether two columns hold the same values and types, whatever their chunks and dictionaries; NaN is NaN."""
    if _plain(one.type) != _plain(other.type):
        return False
    return bool(one.equals(other)) or _stored(one) == _stored(other)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _stored(column: pa.ChunkedArray) -> bytes:
    """The values as Parquet stores them, which is a function of the values alone."""
    table = pa.table({"x": column.combine_chunks()})
    return bytes(
        as_parquet(table, use_dictionary=False, compression="none", write_statistics=False, store_schema=False)
    )


def miscounted(part: pa.Table, record: ShardRecord, suffix: str) -> Iterator[str]:
    for told in TOKEN_COLUMNS:
        name = f"{told}{suffix}"
        if part.schema.names.count(name) != 1:
            continue
        if part.schema.field(name).type == pa.int64():
            # Of no rows there is no sum.
            total = pc.sum(part.column(name)).as_py() or 0
            if total != getattr(record, told):
                yield f"column {name!r} adds up to {total}; the manifest says {getattr(record, told)}"
        else:
            yield f"column {name!r} must be int64"
