"""The rows of one Parquet file, row group by row group; what is damaged is passed on as such.

A row group whose bytes can be read and, time after time, not be decoded is damaged from the first batch that
fails on. Batches begin with their row group, so which rows that are is a function of the file alone.
A store that does not give the bytes is no damage: it is asked again, and then the job fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch.input.tables import nulls, storable
from hycluster.batch.refusal import Reason, Refusal
from hycluster.retries import RetryingCaller
from hycluster.storage import masked_line

READ_ROWS = 8192
# What one batch may come to when it is decoded, and what a row group may weigh that is fetched before it is decoded.
BATCH_BYTES = 16 << 20
FETCHED_BYTES = 128 << 20
# A store that does not give bytes is asked for them for some 16 s. The jitter is for all the readers of a job.
PATIENCE = RetryingCaller(attempts=6, timeout=None, wait_initial=0.5, wait_max=8, wait_jitter=0.5)
# Times that bytes must fail to decode at one place before they are taken for damaged.
DECODE_TRIES = 3
RAW_BYTES = 8 << 20
PAGE_HEADS = 4096

T = TypeVar("T")


class Rows(NamedTuple):
    """Some rows in file order. ``refusal`` is set where they can't be read; then all columns are null."""

    batch: pa.RecordBatch
    refusal: Refusal | None


def open_parquet(handle: pa.NativeFile, int96_unit: str | None = None) -> pq.ParquetFile:
    """Open a file to be decoded in bounded memory, whatever the size of its row groups."""
    parquet = pq.ParquetFile(handle, page_checksum_verification=True, coerce_int96_timestamp_unit=int96_unit)
    metadata = parquet.metadata
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    if max(map(_stored_bytes, groups), default=0) <= FETCHED_BYTES:
        return parquet
    # Page by page; of all columns together no more than of the row group that would have been fetched.
    return pq.ParquetFile(
        handle,
        metadata=metadata,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=int96_unit,
        pre_buffer=False,
        buffer_size=max(1 << 16, min(RAW_BYTES, FETCHED_BYTES // max(1, metadata.num_columns))),
    )


def repeated_bytes(group: pq.RowGroupMetaData) -> int:
    """What a row may come to of values that a dictionary holds once for many rows, and so weigh next to nothing.

    An upper bound: the whole of the dictionaries, of columns that have nothing else.
    """
    return sum(map(_repeated_bytes, map(group.column, range(group.num_columns))))


def _repeated_bytes(column: pq.ColumnChunkMetaData) -> int:
    if column.physical_type != "BYTE_ARRAY" or not column.has_dictionary_page:
        return 0
    dictionary = max(0, column.data_page_offset - (column.dictionary_page_offset or column.data_page_offset))
    # Places in the dictionary are at most four bytes, and pages have heads.
    others = column.total_compressed_size - dictionary
    return max(0, column.total_uncompressed_size) if others <= 5 * column.num_values + PAGE_HEADS else 0


def _stored_bytes(group: pq.RowGroupMetaData) -> int:
    return sum(max(0, group.column(place).total_compressed_size) for place in range(group.num_columns))


def decode(handle: pa.NativeFile, parquet: pq.ParquetFile, groups: list[int]) -> Iterator[Rows]:
    """All rows of some row groups, in order.

    Args:
        handle: the file that ``parquet`` reads from.

    Raises:
        OSError: the bytes can't be had.
    """
    for group in groups:
        yield from _row_group(handle, parquet, group)


def patiently(read: Callable[[], T], patience: RetryingCaller = PATIENCE) -> T:
    """Call; if a store stumbles, wait and call again.

    Raises:
        OSError: it does not give what is asked for, or says at once that it has none or gives none.
    """
    return patience(_stumbled, read)


def _stumbled(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, PermissionError | FileNotFoundError)


def _row_group(handle: pa.NativeFile, parquet: pq.ParquetFile, group: int) -> Iterator[Rows]:
    rows = parquet.metadata.row_group(group).num_rows
    schema = storable(parquet.schema_arrow)
    given = 0
    failed = 0
    why = "rows are missing"
    at_once = _rows_at_once(parquet.metadata.row_group(group))
    while failed < DECODE_TRIES:
        position, before = 0, given
        try:
            for batch in parquet.iter_batches(at_once, row_groups=[group]):
                if position == given:
                    # No more than the footer told: all rows after these are counted from there.
                    wanted = batch.slice(0, rows - given)
                    if not wanted.schema.equals(schema):
                        wanted = pa.record_batch(wanted.columns, schema=schema)
                    yield Rows(wanted, None)
                    given += wanted.num_rows
                position += batch.num_rows
        except Exception as error:
            # Of whatever kind: damage makes decoders raise what nobody thought of.
            try:
                _read_raw(handle, parquet, group)
            except OSError as away:
                raise OSError(f"row group {group}: {away}") from away
            why = masked_line(error)
        if given >= rows:
            return
        failed = failed + 1 if given == before else 1
    message = f"row group {group} of this file is damaged from its row {given} on: {why}"
    refusal = Refusal(Reason.UNREADABLE_ROWS.value, message)
    for begin in range(given, rows, READ_ROWS):
        yield Rows(nulls(schema, min(READ_ROWS, rows - begin)), refusal)


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    row_bytes: int = max(repeated_bytes(group), group.total_byte_size // max(1, group.num_rows), 1)
    return max(1, min(READ_ROWS, BATCH_BYTES // row_bytes))


def _read_raw(handle: pa.NativeFile, parquet: pq.ParquetFile, group: int) -> None:
    """Read a row group's bytes, and nothing more: whether they can be had at all.

    Raises:
        OSError: they can't.
    """
    size = handle.size()
    for begin, end in _extents(parquet, group):
        # Where the footer itself is damaged it names bytes that no store has.
        if not 0 <= begin <= end <= size:
            continue
        for offset in range(begin, end, RAW_BYTES):
            patiently(partial(handle.read_at, min(RAW_BYTES, end - offset), offset))


def _extents(parquet: pq.ParquetFile, group: int) -> list[tuple[int, int]]:
    """From where to where in the file the columns of a row group are, by its footer; none if that can't be told."""
    try:
        metadata = parquet.metadata.row_group(group)
        columns = [metadata.column(place) for place in range(metadata.num_columns)]
    except (OSError, pa.ArrowException):
        return []
    # A file may say 0 for "there is no dictionary".
    begins = [min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns]
    return [(begin, begin + c.total_compressed_size) for begin, c in zip(begins, columns, strict=True)]
