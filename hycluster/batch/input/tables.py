"""What is done with rows of any type: tables are packed, picked from and put together without a look at their values.

Arrow's kernels do not know every type that Parquet files hold: there is no ``take`` of string views, and columns that
share a name can't be told apart by it. A slice is right for all of them, and so is Arrow's own stream format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pat

from hycluster.errors import one_line

PACKED = "packed"


def pack(table: pa.Table) -> pa.Table:
    """A table as one row of bytes: what carries it further knows nothing of its columns, and how large it is."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    ends = pa.array([0, data.size], pa.int64()).buffers()[1]
    return pa.table({PACKED: pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])})


def unpack(block: pa.Table) -> Iterator[pa.Table]:
    """The tables of packed ones, row by row, without a copy."""
    for packed in block.column(PACKED):
        with pa.ipc.open_stream(packed.as_buffer()) as reader:
            yield reader.read_all()


def last(table: pa.Table, name: str) -> pa.ChunkedArray:
    """The last column of a name: what a job adds stands behind what the input has, of whatever name."""
    return table.column(table.schema.get_all_field_indices(name)[-1])


def pick(table: pa.Table, positions: Sequence[int]) -> pa.Table:
    """Some rows, in the given order."""
    slices = []
    start = 0
    for end in range(1, len(positions) + 1):
        if end == len(positions) or positions[end] != positions[end - 1] + 1:
            slices.append(table.slice(positions[start], end - start))
            start = end
    return pa.concat_tables(slices) if slices else table.slice(0, 0)


def as_parquet(table: pa.Table, **options: Any) -> memoryview:
    """A Parquet file of it. Arrow can't write slices of all types; then it is made of a copy."""
    try:
        return _as_parquet(table, options)
    except pa.ArrowNotImplementedError:
        (copy,) = unpack(pack(table))
    return _as_parquet(copy.combine_chunks(), options)


def _as_parquet(table: pa.Table, options: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getbuffer()


def put_together(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows, one table after the other. Where types differ in what may be null, what may be in one may be in all."""
    names = tables[0].schema.names
    if all(table.schema == tables[0].schema for table in tables):
        return pa.concat_tables(tables)
    numbered = [table.rename_columns([str(place) for place in range(len(names))]) for table in tables]
    return pa.concat_tables(numbered, promote_options="default").rename_columns(names)


def storable(schema: pa.Schema) -> pa.Schema:
    """The schema to write: there are files with columns of the type null that must not be null."""
    fields = [field.with_nullable(True) if pat.is_null(field.type) else field for field in schema]
    return pa.schema(fields, schema.metadata)


def nulls(schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Rows of nothing; to hold them, every field may be null."""
    fields = [pa.field(field.name, _nullable(field.type), metadata=field.metadata) for field in schema]
    return pa.record_batch([_nulls(field.type, rows) for field in fields], schema=pa.schema(fields, schema.metadata))


def _nulls(kind: pa.DataType, rows: int) -> pa.Array:
    try:
        return pa.nulls(rows, kind)
    except pa.ArrowNotImplementedError:
        # Of extension types within others.
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, _nulls(kind.storage_type, rows))
        if pat.is_struct(kind):
            fields = [kind.field(place) for place in range(kind.num_fields)]
            children = [_nulls(field.type, rows) for field in fields]
            return pa.StructArray.from_arrays(children, fields=fields, mask=pa.repeat(True, rows))
        if pat.is_list(kind) or pat.is_large_list(kind):
            made = pa.ListArray if pat.is_list(kind) else pa.LargeListArray
            starts = pa.nulls(rows + 1, pa.int32() if pat.is_list(kind) else pa.int64())
            starts = pa.concat_arrays([starts.slice(0, rows), pa.array([0], starts.type)])
            return made.from_arrays(starts, _nulls(kind.value_type, 0), type=kind)
        raise


def unwritable(schema: pa.Schema) -> str | None:
    """Which column no Parquet file can be written with, and why: there are types that only reading knows.

    Tried out, both as it is and with rows that can't be decoded, for nobody lists these types.
    """
    return _unwritable(schema.serialize().to_pybytes())


# The files of an input have few schemas.
@lru_cache(maxsize=256)
def _unwritable(serialized: bytes) -> str | None:
    schema = storable(pa.ipc.read_schema(pa.py_buffer(serialized)))
    if _refusal(schema) is None:
        return None
    for field in schema:
        why = _refusal(pa.schema([field]))
        if why is not None:
            return f"column {field.name!r} is {field.type}, which can be read and not written: {why}"
    return f"its schema can be read and not written: {_refusal(schema)}"


def _refusal(schema: pa.Schema) -> str | None:
    try:
        for some in (pa.Table.from_batches([], schema), pa.Table.from_batches([nulls(schema, 1)])):
            pq.write_table(some, io.BytesIO())
            for _ in unpack(pack(some)):
                pass
    except (pa.ArrowException, ValueError, TypeError) as error:
        return one_line(error)
    return None


def _nullable(kind: pa.DataType) -> pa.DataType:
    """The same type, of which a null can be written: what is within a null struct is null too, and must be allowed to.

    A null list holds nothing, so it needs no change; and types that differ can't all be put together.
    """
    if pat.is_struct(kind):
        return pa.struct([_nullable_field(kind.field(place)) for place in range(kind.num_fields)])
    if pat.is_fixed_size_list(kind):
        return pa.list_(_nullable_field(kind.value_field), kind.list_size)
    return kind


def _nullable_field(field: pa.Field) -> pa.Field:
    return pa.field(field.name, _nullable(field.type), metadata=field.metadata)
