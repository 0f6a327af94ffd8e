"""The ledger's folder: what is written, and what of it counts. As a batch job's output, for which see ``batch/output``.

Layout, by day (UTC, of requests' ends):
    <day>/part-<piece>-<attempt>.parquet  a piece's entries of that day, by one attempt at it
    <day>/_pieces/<piece>.json            the attempt that counts: created once, first finisher wins
    <day>/_manifest.json                  created once, when the day is over: the file that has all of these pieces

A piece is what one process has written until it was cut, or a shard of a batch. Its name tells it from all others, so
any number of processes may commit it, die, and commit it again. What comes for a day that has its manifest lies beside
it. Parts are never changed; those that count no more are deleted later, when nobody reads them.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hycluster.ledger.entry import DAY, SCHEMA, Entry, as_table, day_of
from hycluster.ledger.journal import read_open
from hycluster.settings.base import home
from hycluster.settings.settings import Settings
from hycluster.storage import WritableFolder, leftover_of, locate

# After it, nobody reads what a manifest has made needless.
KEPT_S = 3600.0
# A day is folded when what was written in it has had time to be committed.
FOLD_AFTER_S = 3600.0
READ_TRIES = 3


@dataclass(frozen=True, slots=True)
class LedgerPart:
    """An immutable Parquet file, its path relative to its day."""

    path: str
    rows: int
    bytes: int
    sha256: str


# Of a day, one of its parts.
ReadPart = Callable[[str, LedgerPart], pa.Table]


class Books:
    """A ledger's folder. Every method blocks, and raises OSError where the store is away.

    Args:
        journals: where processes of this machine write what is not committed; None: it is not looked at.
    """

    def __init__(self, folder: WritableFolder, journals: Path | None = None) -> None:
        self.folder = folder
        self.journals = journals
        # By day, those that were there when it was looked at last: they never change.
        self._known: dict[str, dict[str, LedgerPart]] = {}

    def commit(self, piece: str, entries: Iterable[Entry]) -> None:
        """Make a piece a part of the ledger, unless it is already."""
        by_day: dict[str, list[Entry]] = {}
        for entry in entries:
            by_day.setdefault(entry.day, []).append(entry)
        for day, mine in by_day.items():
            if self.holds(day, piece):
                continue
            for made in (day, f"{day}/_pieces"):
                self.folder.make(made)
            part = self._write(day, piece, as_table(mine))
            if not self.folder.create(f"{day}/_pieces/{piece}.json", json.dumps(asdict(part)).encode()):
                self._drop_loser(day, piece, part)

    def holds(self, day: str, piece: str) -> bool:
        """Whether that day's part of a piece is committed."""
        if self.folder.read_whole(f"{day}/_pieces/{piece}.json") is not None:
            return True
        manifest = self._manifest(day)
        return manifest is not None and piece in manifest["pieces"]

    def tables(
        self, since: float | None = None, until: float | None = None, *, read: ReadPart | None = None
    ) -> Iterator[pa.Table]:
        """All entries of the days of a span of time, those that this machine has not committed among them.

        Args:
            read: in the place of :meth:`read`, for whoever needs less of it.
        """
        first, last = day_of(since or 0), "9999" if until is None else day_of(until)
        # Before the records: what is committed meanwhile is there twice, and known by its name.
        pending: dict[tuple[str, str], list[Entry]] = {}
        for piece, entries in read_open(self.journals) if self.journals is not None else ():
            for entry in entries:
                pending.setdefault((entry.day, piece), []).append(entry)
        days = {day for day in self.days() if first <= day <= last}
        for day in sorted(days | {day for day, _ in pending if first <= day <= last}):
            pieces, tables = self._day(day, read or self.read)
            yield from tables
            mine = [
                entry for (of, piece), each in pending.items() if of == day and piece not in pieces for entry in each
            ]
            if mine:
                yield as_table(mine)

    def days(self) -> list[str]:
        found = [info.base_name for info in self.folder.entries() if info.type == pafs.FileType.Directory]
        return sorted(name for name in found if _is_day(name))

    # -- days that are over -------------------------------------------------------------------------

    def tidy(self, now: float | None = None) -> None:
        """Fold days that are over into a file each, and delete what counts no more."""
        now = time.time() if now is None else now
        for day in self.days():
            if datetime.strptime(day, DAY).replace(tzinfo=UTC).timestamp() + 86400 + FOLD_AFTER_S > now:
                continue
            manifest = self._manifest(day)
            if manifest is None:
                self._fold(day)
            elif now - manifest["made_at"] > KEPT_S:
                self._sweep(day, manifest, now)

    def _fold(self, day: str) -> None:
        records = self._records(day)
        if not records:
            return
        path, digest, rows, size = f"part-all-{_attempt()}.parquet", hashlib.sha256(), 0, 0
        with self.folder.writing(f"{day}/{path}") as stream:
            sink = _Hashed(stream, digest)
            with pq.ParquetWriter(pa.PythonFile(sink, "w"), SCHEMA) as writer:
                for part in records.values():
                    table = self.read(day, part)
                    rows += table.num_rows
                    writer.write_table(table)
            size = sink.bytes
        whole = LedgerPart(path, rows, size, digest.hexdigest())
        manifest = {"version": 1, "made_at": time.time(), "file": asdict(whole), "pieces": sorted(records)}
        if not self.folder.create(f"{day}/_manifest.json", json.dumps(manifest).encode()):
            found = self._manifest(day)
            if found is not None and found["file"]["path"] != path:
                self.folder.delete([f"{day}/{path}"])

    def _sweep(self, day: str, manifest: dict[str, Any], now: float) -> None:
        late = {piece: part for piece, part in self._records(day).items() if piece not in manifest["pieces"]}
        needed = {manifest["file"]["path"], *(part.path for part in late.values())}
        parts = [info for info in self.folder.entries(day) if info.type == pafs.FileType.File]
        old = [info.base_name for info in parts if (info.mtime_ns or 0) / 1e9 < now - KEPT_S]
        gone = [name for name in old if name.startswith(("part-", ".")) and name not in needed]
        records = [
            f"_pieces/{name}"
            for name in list(self.folder.names(f"{day}/_pieces"))
            if leftover_of(name) is not None or name.removesuffix(".json") not in late
        ]
        # Records before what they point to.
        self.folder.delete([f"{day}/{name}" for name in [*records, *gone]])

    # -- files --------------------------------------------------------------------------------------

    def _day(self, day: str, read: ReadPart) -> tuple[set[str], list[pa.Table]]:
        """The pieces that are committed for a day, and their entries."""
        for tried in range(READ_TRIES):
            # In this order: a manifest is there long before the records of its pieces go.
            records = self._records(day)
            manifest = self._manifest(day)
            parts = list(records.values())
            if manifest is not None:
                parts = [part for piece, part in records.items() if piece not in manifest["pieces"]]
                parts.append(LedgerPart(**manifest["file"]))
            try:
                tables = [read(day, part) for part in parts]
            except FileNotFoundError:
                # Folded and swept meanwhile; if it is not that, it is gone for good.
                if tried == READ_TRIES - 1:
                    raise
                continue
            return {*records, *(manifest["pieces"] if manifest is not None else ())}, tables
        raise AssertionError("the last try returns or raises")

    def _records(self, day: str) -> dict[str, LedgerPart]:
        found, known = {}, self._known.get(day, {})
        for name in list(self.folder.names(f"{day}/_pieces")):
            piece = name.removesuffix(".json")
            if piece in known:
                found[piece] = known[piece]
            elif leftover_of(name) is None and (told := self.folder.read_whole(f"{day}/_pieces/{name}")) is not None:
                found[piece] = LedgerPart(**json.loads(told))
        self._known[day] = found
        return found

    def _manifest(self, day: str) -> dict[str, Any] | None:
        told = self.folder.read_whole(f"{day}/_manifest.json")
        return None if told is None else json.loads(told)

    def _write(self, day: str, piece: str, table: pa.Table) -> LedgerPart:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        path = f"part-{piece}-{_attempt()}.parquet"
        self.folder.write(f"{day}/{path}", data)
        return LedgerPart(path, table.num_rows, len(data), hashlib.sha256(data).hexdigest())

    def read(self, day: str, part: LedgerPart) -> pa.Table:
        """The entries of a part.

        Raises:
            FileNotFoundError: it is not there any more.
        """
        with self.folder.open_file(f"{day}/{part.path}") as file:
            return pq.read_table(file, schema=SCHEMA)

    def _drop_loser(self, day: str, piece: str, part: LedgerPart) -> None:
        """An object store may say that another was faster to the one who was."""
        told = self.folder.read_whole(f"{day}/_pieces/{piece}.json")
        if told is not None and json.loads(told)["path"] != part.path:
            self.folder.delete([f"{day}/{part.path}"])


def books_of(settings: Settings) -> Books | None:
    """The ledger of a service; None where it is off.

    Raises:
        SettingsError: its store can't be used.
    """
    if not settings.keeps_ledger:
        return None
    return open_books(settings.ledger_place)


def open_books(place: str) -> Books:
    """The ledger at a folder or URI, and what this machine has not committed to it."""
    folder = locate(place, "ledger.store").writable()
    # Services of one home may have ledgers of their own.
    return Books(folder, home() / "ledger-open" / hashlib.sha256(folder.root.encode()).hexdigest()[:16])


def _attempt() -> str:
    return uuid.uuid4().hex[:12]


def _is_day(name: str) -> bool:
    with suppress(ValueError):
        return datetime.strptime(name, DAY).strftime(DAY) == name  # noqa: DTZ007 - a day, not a time
    return False


class _Hashed:
    """A stream that knows what went through it."""

    closed = False

    def __init__(self, stream: Any, digest: Any) -> None:
        self._stream = stream
        self._digest = digest
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._stream.write(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False
