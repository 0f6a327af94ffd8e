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

from hycluster.batch.refusal import Reason, Refusal
from hycluster.retries import RetryingCaller
from hycluster.storage import masked_line

READ_ROWS = 8192
# A store that does not give bytes is asked for them for some 16 s. The jitter is for all the readers of a job.
PATIENCE = RetryingCaller(attempts=6, timeout=None, wait_initial=0.5, wait_max=8, wait_jitter=0.5)
# Times that bytes must fail to decode at one place before they are taken for damaged.
DECODE_TRIES = 3
RAW_BYTES = 8 << 20

T = TypeVar("T")


class Rows(NamedTuple):
    """Some rows in file order. ``refusal`` is set where they can't be read; then all columns are null."""

    batch: pa.RecordBatch
    refusal: Refusal | None


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
    given = 0
    failed = 0
    why = "rows are missing"
    while failed < DECODE_TRIES:
        position, before = 0, given
        try:
            for batch in parquet.iter_batches(READ_ROWS, row_groups=[group]):
                if position == given:
                    yield Rows(batch, None)
                    given += batch.num_rows
                position += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            _read_raw(handle, parquet, group)
            why = masked_line(error)
        if given >= rows:
            return
        failed = failed + 1 if given == before else 1
    message = f"row group {group} of this file is damaged from its row {given} on: {why}"
    yield Rows(_nulls(parquet.schema_arrow, rows - given), Refusal(Reason.UNREADABLE_ROWS.value, message))


def _read_raw(handle: pa.NativeFile, parquet: pq.ParquetFile, group: int) -> None:
    """Read a row group's bytes, and nothing more: whether they can be had at all.

    Raises:
        OSError: they can't.
    """
    metadata = parquet.metadata.row_group(group)
    for column in map(metadata.column, range(metadata.num_columns)):
        # A file may say 0 for "there is no dictionary".
        begin = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
        end = begin + column.total_compressed_size
        for offset in range(begin, end, RAW_BYTES):
            patiently(partial(handle.read_at, min(RAW_BYTES, end - offset), offset))


def _nulls(schema: pa.Schema, rows: int) -> pa.RecordBatch:
    fields = [field.with_nullable(True) for field in schema]
    return pa.record_batch([pa.nulls(rows, field.type) for field in fields], schema=pa.schema(fields, schema.metadata))
