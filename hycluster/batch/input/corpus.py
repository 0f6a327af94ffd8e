"""Which rows there are, in which shards, and how they are read.

The plan is a pure function of the input: relative paths in order, row groups and sizes from the
Parquet footers. A shard is a run of rows of one file; its number and its rows follow from the
plan by arithmetic, so neither rows nor ids are ever held, and the plan costs memory by the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, groupby

import pyarrow as pa

from hycluster.batch.input.footers import Footer, ReadFooters, footers, row_groups_of
from hycluster.batch.input.listing import Listing, list_files, wanted
from hycluster.batch.input.row_groups import Rows, decode, open_parquet, patiently
from hycluster.batch.input.tables import put_together
from hycluster.batch.refusal import ColumnRefused, Reason, Refusal
from hycluster.errors import JobFailed, SettingsError
from hycluster.storage import Folder, masked_line

ROW_ID = "row_id"
# Tells the shards in a block apart; never written out.
SHARD = "__hycluster_shard"
# Why a row can't be asked, where that is known already; neither. Only blocks with such rows have this column.
REFUSAL = "__hycluster_refusal"
REFUSAL_TYPE = pa.struct([("error_type", pa.string()), ("error_message", pa.string())])
RESULT_COLUMNS = ("output", "finish_reason", "prompt_tokens", "completion_tokens")
REFUSAL_COLUMNS = ("error_type", "error_message")
# What a job adds to the columns of its input.
ADDED = (ROW_ID, *RESULT_COLUMNS, *REFUSAL_COLUMNS)
RESERVED = (SHARD, REFUSAL)
# Wide rows make smaller shards, so that what is in memory is bounded in bytes too.
SHARD_BYTES = 16 << 20
# The same for values that a dictionary holds once: what a shard comes to if every row has all of them.
DECODED_BYTES = 256 << 20
# What one read brings in. A row group that is larger is decoded once a span, so spans are not small.
SPAN_BYTES = 64 << 20
SPAN_SHARDS = 64


@dataclass(frozen=True, slots=True)
class File:
    """One input file as its footer tells it.

    Attributes:
        path: relative to the input, with ``/``.
        bytes: size of the file.
        row_groups: rows of each.
        data_bytes: uncompressed size of all row groups.
        schema: digest of the schema; equal schemas have equal digests.
        fault: why none of its rows can be asked. A file that can't be read at all counts as one row.
        int96_unit: of its timestamps of 96 bits; see there.
        repeated_bytes: what a row may come to beside its share of ``data_bytes``; see there.
        partition: columns that its path tells, after those of the file; their names are not among these.
    """

    path: str
    bytes: int
    row_groups: tuple[int, ...]
    data_bytes: int
    schema: str
    fault: Refusal | None = None
    int96_unit: str | None = None
    repeated_bytes: int = 0
    partition: tuple[tuple[str, str | None], ...] = ()

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    @property
    def unreadable(self) -> bool:
        return self.fault is not None and self.fault.error_type == Reason.UNREADABLE_FILE.value


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

    def row_id(self, row: int) -> str:
        """Id of one of its rows, counted from 0; an unreadable file's one row has the file's name."""
        return self.file.path if self.file.unreadable else f"{self.file.path}#{self.first_row + row}"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All files of the input, in order, and how they are cut.

    Attributes:
        folder: that all paths are relative to.
        pattern: what was looked for below it, a glob a folder.
        left_out: what was found there and is no part of it, and why, a line each.
        taken: the names of columns that some file has.
        snapshot: of the table that the input is: Delta's version, Iceberg's snapshot id.
    """

    folder: Folder
    pattern: tuple[str, ...]
    files: tuple[File, ...]
    shard_rows: int
    left_out: tuple[str, ...] = ()
    taken: frozenset[str] = frozenset()
    snapshot: int | None = None

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def shards(self) -> Iterator[Shard]:
        """The shards in order, one at a time; the same input gives the same shards."""
        for first_number, file in self._numbered():
            yield from self._cut(first_number, file)

    def in_order(self, done: Container[int]) -> Iterator[Shard]:
        """The shards that are left to do, those of files that are at fault first.

        If they are too many for the job, it ends before any engine has worked for it.
        """
        for first_number, file in sorted(
            self._numbered(), key=lambda pair: (not pair[1].unreadable, not pair[1].fault)
        ):
            yield from (shard for shard in self._cut(first_number, file) if shard.number not in done)

    @property
    def unseen_rows(self) -> int:
        """How many rows more the unreadable files may have held than they count for, by their size."""
        readable = [file for file in self.files if not file.unreadable]
        row_bytes = sum(file.bytes for file in readable) / max(1, sum(file.rows for file in readable))
        return sum(max(0, round(file.bytes / max(1.0, row_bytes)) - 1) for file in self.files if file.unreadable)

    @property
    def shard_count(self) -> int:
        return sum(-(-file.rows // self._rows_a_shard(file)) for file in self.files)

    def takes(self, folder: Folder, path: str) -> bool:
        """Whether a file of that path in another folder would be part of this input."""
        if type(folder) is not type(self.folder):
            return False
        root, place = f"{self.folder.real()}/", folder.real(path)
        if place.startswith(root) and wanted(place.removeprefix(root), self.pattern):
            return True
        # The way in may be a link.
        there = f"{folder.real()}/"
        return any(self.folder.real(file.path).startswith(there) for file in self.files)

    def digest(self) -> str:
        """A name for exactly this input, cut in exactly this way."""
        digest = hashlib.sha256(json.dumps([self.shard_rows, SHARD_BYTES]).encode())
        for file in self.files:
            # Only where it counts, so that outputs from before it was looked at are still known.
            most = [self._most_rows(file)] if self._most_rows(file) < self.shard_rows else []
            digest.update(json.dumps([file.path, file.bytes, file.row_groups, file.schema, *most]).encode())
        return digest.hexdigest()

    def _numbered(self) -> Iterator[tuple[int, File]]:
        """Each file with the number of its first shard."""
        number = 0
        for file in self.files:
            yield number, file
            number += -(-file.rows // self._rows_a_shard(file))

    def _cut(self, first_number: int, file: File) -> Iterator[Shard]:
        rows = self._rows_a_shard(file)
        for place, first_row in enumerate(range(0, file.rows, rows)):
            yield Shard(first_number + place, file, first_row, min(rows, file.rows - first_row))

    def _rows_a_shard(self, file: File) -> int:
        row_bytes = file.data_bytes // max(1, file.rows)
        return max(1, min(self.shard_rows, SHARD_BYTES // max(1, row_bytes), self._most_rows(file)))

    def _most_rows(self, file: File) -> int:
        """Rows that a shard may have at most, should each of them be as large as any may be."""
        return DECODED_BYTES // max(1, file.repeated_bytes)


def plan_shards(
    place: Folder,
    *,
    shard_rows: int,
    check: Callable[[pa.Schema, str], None],
    read_footers: ReadFooters = footers,
    snapshot: int | None = None,
) -> ShardPlan:
    """Look at the input: list it, read all footers, check all schemas. No text is read.

    Args:
        place: a Parquet file, a folder (searched for ``*.parquet`` at any depth; names that begin
            with ``.`` or ``_`` are skipped), or a glob (``**`` is any depth).
        check: raises ``ColumnRefused``, given a schema and the file's name, if its rows can't be asked.
        read_footers: in this process or, where nobody knows who wrote the files, in another one.
        snapshot: of the table that ``place`` is; the latest by default.

    Files that can't be read, and those whose columns ``check`` refuses, are part of the plan with their fault.

    Raises:
        SettingsError: nothing there, no file that can be read, columns refused in every one, or a schema that no
            file may have.
    """
    listing = list_files(place, snapshot)
    told = read_footers(listing.folder, list(listing.sizes))
    taken: set[str] = set()
    # In order: the first file that is wrong is the one that is named.
    files = tuple(
        _planned(check, taken, listing, path, footer) for path, footer in zip(listing.sizes, told, strict=True)
    )
    faults = [file.fault for file in files if file.fault]
    if len(faults) == len(files):
        raise SettingsError(faults[0].error_message)
    number = listing.snapshot.number if listing.snapshot else None
    return ShardPlan(listing.folder, listing.pattern, files, shard_rows, listing.left_out, frozenset(taken), number)


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


def read_shards(folder: Folder, shards: Iterable[Shard]) -> Iterator[pa.Table]:
    """One table a shard: the input columns, ``row_id`` and the shard's number.

    Where rows are refused already there is a column ``REFUSAL`` too. Rows that can't be decoded have null in all
    input columns; a file that can't be read is one row without input columns.

    Raises:
        JobFailed: a file can't be reached or is not what it was when the job was planned.
    """
    for file, of_file in groupby(shards, lambda shard: shard.file):
        if file.unreadable:
            yield from (_named([], shard) for shard in of_file)
            continue
        try:
            yield from _read_file(folder, file, list(of_file))
        except (OSError, pa.ArrowException) as error:
            raise JobFailed(f"input: {file.path}: can't be read: {masked_line(error)}") from None


def _read_file(folder: Folder, file: File, shards: list[Shard]) -> Iterator[pa.Table]:
    with (
        patiently(partial(folder.open_file, file.path)) as handle,
        open_parquet(handle, file.int96_unit) as parquet,
    ):
        if handle.size() != file.bytes or row_groups_of(parquet.metadata) != file.row_groups:
            raise JobFailed(f"input: {file.path}: has changed since the job was planned")
        ends = list(accumulate(file.row_groups))
        first, last = shards[0].first_row, shards[-1].first_row + shards[-1].rows
        groups = [g for g, end in enumerate(ends) if end > first and end - file.row_groups[g] < last]
        position = ends[groups[0]] - file.row_groups[groups[0]]
        waiting = iter(shards)
        shard = next(waiting)
        pieces: list[Rows] = []
        for batch, refusal in decode(handle, parquet, groups):
            while True:
                begin = max(shard.first_row, position)
                end = min(shard.first_row + shard.rows, position + batch.num_rows)
                if begin < end:
                    pieces.append(Rows(batch.slice(begin - position, end - begin), refusal))
                if end < shard.first_row + shard.rows:
                    break
                yield _named(pieces, shard)
                pieces = []
                following = next(waiting, None)
                if following is None:
                    return
                shard = following
            position += batch.num_rows


def _named(pieces: list[Rows], shard: Shard) -> pa.Table:
    ids = pa.array([shard.row_id(row) for row in range(shard.rows)], pa.string())
    if pieces:
        # Batches of nulls may be nullable where the others are not.
        table = put_together([pa.Table.from_batches([rows.batch]) for rows in pieces])
        for name, value in shard.file.partition:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), shard.rows))
        table = table.append_column(ROW_ID, ids)
    else:
        table = pa.table({ROW_ID: ids})
    table = table.append_column(SHARD, pa.repeat(pa.scalar(shard.number, pa.int64()), shard.rows))
    fault = shard.file.fault
    if fault is None and not any(rows.refusal for rows in pieces):
        return table
    # Rows that can't be read say so, whatever else is wrong with their file.
    refusals = [(rows.refusal or fault, rows.batch.num_rows) for rows in pieces] or [(fault, shard.rows)]
    marks = [asdict(refusal) if refusal else None for refusal, rows in refusals for _ in range(rows)]
    return table.append_column(REFUSAL, pa.array(marks, REFUSAL_TYPE))


def _planned(
    check: Callable[[pa.Schema, str], None], taken: set[str], listing: Listing, path: str, footer: Footer | str
) -> File:
    where = f"input: {path}"
    if isinstance(footer, str):
        # One row, which stands for however many there are.
        return File(path, listing.sizes[path], (1,), 0, "", Refusal(Reason.UNREADABLE_FILE.value, f"{where}: {footer}"))
    schema = footer.schema
    partition = tuple((name, value) for name, value in listing.partition(path) if name not in schema.names)
    for name, _ in partition:
        schema = schema.append(pa.field(name, pa.string()))
    for column in schema.names:
        if column in RESERVED:
            raise SettingsError(f"{where}: column {column!r} has a name that jobs use within; rename it")
    taken.update(schema.names)
    fault = None
    try:
        check(schema, where)
    except ColumnRefused as refused:
        fault = Refusal(refused.reason.value, refused.message)
    digest = hashlib.sha256(schema.serialize().to_pybytes()).hexdigest()[:16]
    return File(
        path,
        footer.size,
        footer.row_groups,
        footer.data_bytes,
        digest,
        fault,
        footer.int96_unit,
        footer.repeated_bytes,
        partition,
    )
