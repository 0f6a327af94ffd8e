"""What the footer of a Parquet file tells, and whether it can be believed.

Nobody knows who wrote the file. A footer may be damaged so that it claims what can't be, and there are some that end
the process that reads them (``apart.py``): all of it is looked at before the file becomes part of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch.input.int96 import int96_unit
from hycluster.batch.input.row_groups import patiently, repeated_bytes
from hycluster.batch.input.tables import unwritable
from hycluster.retries import RetryingCaller
from hycluster.storage import Folder, masked_line

READERS = 16
# More than any encoding comes to, of rows that say something: a footer that claims more is not believed.
MOST_ROWS_A_BYTE = 10_000
PATIENCE = RetryingCaller(attempts=4, timeout=None, wait_initial=0.2, wait_max=0.8, wait_jitter=0.2)


@dataclass(frozen=True, slots=True)
class Footer:
    """What a file is like.

    Attributes:
        serialized: its schema as bytes: not every schema that a file has comes through pickle.
        row_groups: rows of each.
        data_bytes: uncompressed size of all row groups.
        repeated_bytes: what a row may come to beside its share of these; see there.
        int96_unit: of its timestamps of 96 bits; see there.
    """

    size: int
    serialized: bytes
    row_groups: tuple[int, ...]
    data_bytes: int
    repeated_bytes: int = 0
    int96_unit: str | None = None

    @property
    def schema(self) -> pa.Schema:
        return pa.ipc.read_schema(pa.py_buffer(self.serialized))


# In the order of the paths: what each footer tells, or why nothing can be done with that file.
ReadFooters = Callable[[Folder, Sequence[str]], Iterator[Footer | str]]


def footers(folder: Folder, paths: Sequence[str]) -> Iterator[Footer | str]:
    """Read them all, many at a time."""
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(partial(footer_or_fault, folder), paths)


def footer_or_fault(folder: Folder, path: str) -> Footer | str:
    """What a file's footer tells, or why nothing can be done with the file."""
    try:
        return patiently(partial(_read, folder, path), PATIENCE)
    except Exception as error:
        # Of whatever kind: a column whose name is not UTF-8 is as good a reason as another.
        return f"is not a readable Parquet file: {masked_line(error)}"


def _open(handle: pa.NativeFile) -> pq.ParquetFile:
    """Open a file; if its bytes can be had, whatever is wrong with them is no stumbling of the store's.

    Raises:
        OSError: they can't.
    """
    try:
        return pq.ParquetFile(handle)
    except OSError as error:
        handle.read_at(min(handle.size(), 8), max(0, handle.size() - 8))
        raise ValueError(str(error)) from error


def row_groups_of(metadata: pq.FileMetaData) -> tuple[int, ...]:
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def _read(folder: Folder, path: str) -> Footer | str:
    with folder.open_file(path) as handle, _open(handle) as parquet:
        size, metadata = handle.size(), parquet.metadata
        row_groups = row_groups_of(metadata)
        if min(row_groups, default=0) < 0 or sum(row_groups) > MOST_ROWS_A_BYTE * size:
            return f"is damaged: its footer claims {sum(row_groups)} rows in {size} bytes"
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        data_bytes = sum(max(0, group.total_byte_size) for group in groups)
        # Looks at every column of every row group: what ends a process is to do so now.
        repeated = max(map(repeated_bytes, groups), default=0)
        unit = int96_unit(handle, metadata)
        schema = parquet.schema_arrow
        if unit is not None:
            schema = pq.ParquetFile(handle, metadata=metadata, coerce_int96_timestamp_unit=unit).schema_arrow
        why = unwritable(schema)
        return why or Footer(size, schema.serialize().to_pybytes(), row_groups, data_bytes, repeated, unit)
