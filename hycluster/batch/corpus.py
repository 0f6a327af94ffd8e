"""Which rows there are, in which shards, and how they are read.

The plan is a pure function of the input: relative paths in order, row groups and sizes from the
Parquet footers. A shard is a run of rows of one file; its number and its rows follow from the
plan by arithmetic, so neither rows nor ids are ever held, and the plan costs memory by the file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hycluster.batch.storage import locate, one_line, shown
from hycluster.errors import JobFailed, SettingsError

ROW_ID = "row_id"
# Tells the shards in a block apart; never written out.
SHARD = "__hycluster_shard"
RESULT_COLUMNS = ("output", "finish_reason", "prompt_tokens", "completion_tokens")
REFUSAL_COLUMNS = ("error_type", "error_message")
RESERVED = (ROW_ID, *RESULT_COLUMNS, *REFUSAL_COLUMNS, SHARD)
# Wide rows make smaller shards, so that what is in memory is bounded in bytes too.
SHARD_BYTES = 16 << 20
# What one read brings in. A row group that is larger is decoded once a span, so spans are not small.
SPAN_BYTES = 64 << 20
SPAN_SHARDS = 64
FOOTER_READERS = 16
READ_ROWS = 8192


@dataclass(frozen=True, slots=True)
class File:
    """One input file as its footer tells it.

    Attributes:
        path: relative to the input, with ``/``.
        bytes: size of the file.
        row_groups: rows of each.
        data_bytes: uncompressed size of all row groups.
        schema: digest of the schema; equal schemas have equal digests.
    """

    path: str
    bytes: int
    row_groups: tuple[int, ...]
    data_bytes: int
    schema: str

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``first_row`` to ``first_row + rows`` of one file."""

    number: int
    file: File
    first_row: int
    rows: int

    @property
    def bytes(self) -> int:
        """Rough size in memory."""
        return self.file.data_bytes * self.rows // max(1, self.file.rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """All files of the input, in order, and how they are cut.

    Attributes:
        root: folder that all paths are relative to.
        pattern: what was looked for below it, a glob a folder.
    """

    filesystem: pafs.FileSystem
    root: str
    pattern: tuple[str, ...]
    files: tuple[File, ...]
    shard_rows: int

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def shards(self) -> Iterator[Shard]:
        """The shards in order, one at a time; the same input gives the same shards."""
        number = 0
        for file in self.files:
            rows = self._rows_a_shard(file)
            for first_row in range(0, file.rows, rows):
                yield Shard(number, file, first_row, min(rows, file.rows - first_row))
                number += 1

    @property
    def shard_count(self) -> int:
        return sum(-(-file.rows // self._rows_a_shard(file)) for file in self.files)

    def takes(self, filesystem: pafs.FileSystem, path: str) -> bool:
        """Whether a file of that path would be part of this input."""
        if type(filesystem) is not type(self.filesystem) or not path.startswith(f"{self.root}/"):
            return False
        return _wanted(path[len(self.root) + 1 :], self.pattern)

    def digest(self) -> str:
        """A name for exactly this input, cut in exactly this way."""
        digest = hashlib.sha256(json.dumps([self.shard_rows, SHARD_BYTES]).encode())
        for file in self.files:
            digest.update(json.dumps([file.path, file.bytes, file.row_groups, file.schema]).encode())
        return digest.hexdigest()

    def _rows_a_shard(self, file: File) -> int:
        row_bytes = file.data_bytes // max(1, file.rows)
        return max(1, min(self.shard_rows, SHARD_BYTES // max(1, row_bytes)))


def plan(path: str, *, shard_rows: int, check: Callable[[pa.Schema, str], None]) -> Plan:
    """Look at the input: list it, read all footers, check all schemas. No row is read.

    Args:
        path: a Parquet file, a folder (searched for ``*.parquet`` at any depth; names that begin
            with ``.`` or ``_`` are skipped), a glob (``**`` is any depth), or a URI of one of these.
        check: refuses a schema, given it and the file's name.

    Raises:
        SettingsError: nothing there, not Parquet, or a schema is refused.
    """
    filesystem, inner = locate(path, "input.path")
    try:
        root, pattern, paths = _list(filesystem, inner, path)
    except OSError as error:
        raise SettingsError(f"input.path: {shown(path)!r} can't be read: {one_line(error)}") from None
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        # Serial for the caller: the first file in order that is wrong is the one that is named.
        files = tuple(readers.map(partial(_inspect, filesystem, root, check), paths))
    return Plan(filesystem, root, pattern, files, shard_rows)


class Span:
    """Shards that are read as one, in order. Neighbours in a file are held as one run, whatever their number."""

    __slots__ = ("_count", "_runs", "bytes", "rows")

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        # The first shard of a run, its shards and its rows. Only a file's last shard is shorter than its others.
        self._runs: list[tuple[Shard, int, int]] = []
        self._count = 0
        self.rows = 0
        self.bytes = 0
        for shard in shards:
            self.append(shard)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Shard]:
        for first, shards, rows in self._runs:
            for n in range(shards):
                done = n * first.rows
                yield Shard(first.number + n, first.file, first.first_row + done, min(first.rows, rows - done))

    @property
    def schema(self) -> str | None:
        """Digest of the schema of all its files; None of no shards."""
        return self._runs[0][0].file.schema if self._runs else None

    def append(self, shard: Shard) -> None:
        self._count += 1
        self.rows += shard.rows
        self.bytes += shard.bytes
        if self._runs:
            first, shards, rows = self._runs[-1]
            following = (first.file, first.number + shards, first.first_row + shards * first.rows)
            if (shard.file, shard.number, shard.first_row) == following and shard.rows <= first.rows:
                self._runs[-1] = (first, shards + 1, rows + shard.rows)
                return
        self._runs.append((shard, 1, shard.rows))


def spans(shards: Iterable[Shard], span_bytes: int = SPAN_BYTES) -> Iterator[Span]:
    """Cut a run of shards into reads: neighbours with one schema, not much to hold at once."""
    span = Span()
    for shard in shards:
        full = len(span) == SPAN_SHARDS or span.bytes + shard.bytes > span_bytes
        if len(span) and (full or shard.file.schema != span.schema):
            yield span
            span = Span()
        span.append(shard)
    if len(span):
        yield span


def read(filesystem: pafs.FileSystem, root: str, shards: Iterable[Shard]) -> Iterator[pa.Table]:
    """One table a shard: the input columns, ``row_id`` and the shard's number.

    Raises:
        JobFailed: a file can't be read or is not what it was when the job was planned.
    """
    for file, of_file in groupby(shards, lambda shard: shard.file):
        try:
            yield from _read_file(filesystem, f"{root}/{file.path}", file, list(of_file))
        except (OSError, pa.ArrowException) as error:
            raise JobFailed(f"input: {file.path}: can't be read: {one_line(error)}") from None


def _read_file(filesystem: pafs.FileSystem, path: str, file: File, shards: list[Shard]) -> Iterator[pa.Table]:
    with filesystem.open_input_file(path) as handle, pq.ParquetFile(handle) as parquet:
        if _row_groups(parquet.metadata) != file.row_groups:
            raise JobFailed(f"input: {file.path}: has changed since the job was planned")
        ends = list(accumulate(file.row_groups))
        first, last = shards[0].first_row, shards[-1].first_row + shards[-1].rows
        groups = [g for g, end in enumerate(ends) if end > first and end - file.row_groups[g] < last]
        position = ends[groups[0]] - file.row_groups[groups[0]]
        waiting = iter(shards)
        shard = next(waiting)
        pieces: list[pa.RecordBatch] = []
        for batch in parquet.iter_batches(READ_ROWS, row_groups=groups):
            while True:
                begin = max(shard.first_row, position)
                end = min(shard.first_row + shard.rows, position + batch.num_rows)
                if begin < end:
                    pieces.append(batch.slice(begin - position, end - begin))
                if end < shard.first_row + shard.rows:
                    break
                yield _named(pa.Table.from_batches(pieces), shard)
                pieces = []
                following = next(waiting, None)
                if following is None:
                    return
                shard = following
            position += batch.num_rows


def _named(table: pa.Table, shard: Shard) -> pa.Table:
    ids = [f"{shard.file.path}#{row}" for row in range(shard.first_row, shard.first_row + shard.rows)]
    table = table.append_column(ROW_ID, pa.array(ids, pa.string()))
    return table.append_column(SHARD, pa.repeat(pa.scalar(shard.number, pa.int64()), shard.rows))


def _list(filesystem: pafs.FileSystem, inner: str, path: str) -> tuple[str, tuple[str, ...], list[str]]:
    """The folder that row ids are relative to, the pattern below it, and the files there in order."""
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.File:
        root, _, name = inner.rpartition("/")
        return root, (name,), [name]
    pattern: tuple[str, ...]
    if info.type == pafs.FileType.Directory:
        root, pattern = inner, ("**", "*.parquet")
    elif re.search(r"[*?\[]", inner):
        fixed = re.split(r"[*?\[]", inner, maxsplit=1)[0]
        root = fixed.rpartition("/")[0]
        pattern = tuple(inner[len(root) + 1 :].split("/"))
        if filesystem.get_file_info(root).type != pafs.FileType.Directory:
            raise SettingsError(f"input.path: {shown(path)!r}: there is no folder {root!r}")
    else:
        raise SettingsError(f"input.path: {shown(path)!r}: no such file or folder")
    below = (
        found.path[len(root) + 1 :]
        for found in filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        if found.type == pafs.FileType.File
    )
    paths = sorted(path for path in below if _wanted(path, pattern))
    if not paths:
        what = "no *.parquet file in this folder" if root == inner else "no file matches"
        raise SettingsError(f"input.path: {shown(path)!r}: {what}")
    return root, pattern, paths


def _wanted(path: str, pattern: tuple[str, ...]) -> bool:
    parts = tuple(path.split("/"))
    return _matches(parts, pattern) and not any(part[0] in "._" for part in parts)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """A glob, folder by folder: ``*`` stays within one, ``**`` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _row_groups(metadata: pq.FileMetaData) -> tuple[int, ...]:
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def _inspect(filesystem: pafs.FileSystem, root: str, check: Callable[[pa.Schema, str], None], path: str) -> File:
    try:
        with filesystem.open_input_file(f"{root}/{path}") as handle:
            size = handle.size()
            with pq.ParquetFile(handle) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
    except (OSError, pa.ArrowException) as error:
        raise SettingsError(f"input: {path}: is not a readable Parquet file: {one_line(error)}") from None
    for column in schema.names:
        if column in RESERVED:
            raise SettingsError(f"input: {path}: column {column!r} has a name that the output uses; rename it")
    check(schema, f"input: {path}")
    data_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    digest = hashlib.sha256(schema.serialize().to_pybytes()).hexdigest()[:16]
    return File(path, size, _row_groups(metadata), data_bytes, digest)
