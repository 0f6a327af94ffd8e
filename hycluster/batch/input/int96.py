"""Spark's old timestamps, 96 bits each: days and nanoseconds, which no 64 bits hold.

Arrow reads them as nanoseconds, which reach from 1677 to 2262, and turns what lies beyond (Spark's "no end" is the year
9999) into other dates without a word. Microseconds reach far enough, but may cut digits off. Which of the two a file
needs no footer tells, so its columns of this type are read once when the input is planned.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pat

INT96 = "INT96"
READ_ROWS = 65_536
# What 64 bits of nanoseconds reach, in microseconds.
REACH_US = (2**63 - 1) // 1000


class NeitherUnitError(ValueError):
    """Some times of the file are beyond what nanoseconds reach, and others finer than microseconds."""


def int96_unit(handle: pa.NativeFile, metadata: pq.FileMetaData) -> str | None:
    """The unit to read a file's timestamps of 96 bits with; None is what Arrow does by itself.

    Raises:
        NeitherUnitError
    """
    columns = [metadata.schema.column(place) for place in range(len(metadata.schema))]
    paths = [column.path for column in columns if column.physical_type == INT96]
    if not paths or not any(_beyond(times) for times in _times(handle, "us", paths)):
        return None
    # What is beyond is nonsense here; among the rest are the digits that microseconds would lose.
    for coarse, fine in zip(_times(handle, "us", paths), _times(handle, "ns", paths), strict=False):
        here = pc.and_(pc.less_equal(coarse, REACH_US), pc.greater_equal(coarse, -REACH_US))
        if pc.any(pc.and_(here, pc.not_equal(pc.multiply(pc.divide(fine, 1000), 1000), fine))).as_py():
            raise NeitherUnitError(
                f"{', '.join(paths)}: holds times (INT96) beyond the years 1677 to 2262 and times finer than"
                " microseconds; no type of Arrow holds both"
            )
    return "us"


def _beyond(times: pa.Array) -> bool:
    return bool(pc.any(pc.or_(pc.greater(times, REACH_US), pc.less(times, -REACH_US))).as_py())


def _times(handle: pa.NativeFile, unit: str, paths: list[str]) -> Iterator[pa.Array]:
    """All times of these columns as numbers, row group by row group, as far as they can be read."""
    handle.seek(0)
    parquet = pq.ParquetFile(handle, coerce_int96_timestamp_unit=unit)
    for group in range(parquet.metadata.num_row_groups):
        try:
            for batch in parquet.iter_batches(READ_ROWS, row_groups=[group], columns=paths):
                for column in batch.columns:
                    yield from _leaves(column)
        except (OSError, pa.ArrowException):
            # Damaged: what these rows hold is not read later either.
            continue


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    kind = array.type
    if pat.is_timestamp(kind):
        yield array.view(pa.int64())
    elif pat.is_struct(kind):
        for child in array.flatten():
            yield from _leaves(child)
    elif pat.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pat.is_list(kind) or pat.is_large_list(kind) or pat.is_fixed_size_list(kind) or pat.is_list_view(kind):
        yield from _leaves(array.flatten())
