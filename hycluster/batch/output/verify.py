"""Prove from the files alone that every input row is exactly once in the output or the quarantine.

Nothing that the job remembers is believed: the plan is made anew from the input, and the files that the
manifest names are read back and compared with the input, a few shards at a time. Memory does not grow with
the number of rows.

A Parquet file in the output that the manifest does not name is a fault too: whoever reads by ``part-*.parquet``
would see its rows. Other files there are nobody's business.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch.input.apart import footers_apart
from hycluster.batch.input.corpus import (
    REFUSAL_COLUMNS,
    RESULT_COLUMNS,
    Shard,
    ShardPlan,
    plan_shards,
    read_shards,
    spans,
)
from hycluster.batch.output.commit import OLD_QUARANTINE, QUARANTINE, OutputFolder
from hycluster.batch.output.compare import MOST_ROWS, miscounted, row_differences
from hycluster.batch.output.manifest import read_manifest
from hycluster.batch.output.record import DAMAGE, ShardRecord, Totals, Written
from hycluster.batch.output.shard_set import PartNames
from hycluster.errors import HyclusterError, SettingsError
from hycluster.storage import Folder, masked_line

# Faults that are told one by one; the rest is counted.
MOST_FAULTS = 20
# Where parts are; the path of one begins with it.
FOLDERS = ("", f"{QUARANTINE}/", f"{OLD_QUARANTINE}/")
# Shards whose files are fetched at once.
READERS = 8

T = TypeVar("T")


@dataclass(slots=True)
class Verdict:
    """What was found.

    Attributes:
        faults: one line each, at most ``MOST_FAULTS`` of them.
        fault_count: how many there are.
        shards, totals, bytes: of what was read back.
    """

    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    shards: int = 0
    bytes: int = 0
    totals: Totals = field(default_factory=Totals)

    def fault(self, line: str) -> None:
        self.fault_count += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(line)

    def lines(self) -> list[str]:
        """What to print: one summary line, or one line a fault."""
        if not self.fault_count:
            totals = self.totals
            finished = totals.rows - totals.quarantined
            where = f"{finished} in the output, {totals.quarantined} in the quarantine"
            size = f"({self.shards} shards, {self.bytes} bytes)"
            return [f"verified: {totals.rows} rows, each exactly once: {where} {size}"]
        more = self.fault_count - len(self.faults)
        return [*self.faults, *([f"and {more} more"] if more else [])]


def verify_output(folder: Folder, input_folder: Folder) -> Verdict:
    """Compare a finished output with its input.

    Raises:
        SettingsError: there is no job's output in ``folder``, or nothing that can be read in ``input_folder``.
    """
    return _Verification(folder, input_folder).run()


class _Verification:
    def __init__(self, folder: Folder, input_folder: Folder) -> None:
        self._folder = folder
        self._input_folder = input_folder
        self._output = OutputFolder(folder)
        self._verdict = Verdict()
        self._say = self._verdict.fault

    def run(self) -> Verdict:
        finished = self._folder.exists("_SUCCESS")
        identity = self._json("_job.json")
        if identity is None:
            if not finished and not self._folder.exists("_manifest.json"):
                raise SettingsError(f"OUTPUT: {self._folder.masked!r} holds no output of a job (there is no _job.json)")
            self._say("_job.json: is missing or unreadable")
            return self._verdict
        if not finished:
            self._say("_SUCCESS: is missing: the job has not finished; its own command resumes it")
            return self._verdict
        corpus = self._plan(identity)
        if corpus is None:
            return self._verdict
        try:
            with self._folder.open_stream("_manifest.json") as stream:
                head, records = read_manifest(io.TextIOWrapper(stream, encoding="utf-8"))
                self._read_back(corpus, head, identity, records)
        except FileNotFoundError:
            self._say("_manifest.json: is missing")
        except OSError as error:
            self._say(f"_manifest.json: can't be read: {masked_line(error)}")
        except HyclusterError as error:
            self._say(error.message)
        return self._verdict

    def _plan(self, identity: dict[str, Any]) -> ShardPlan | None:
        """The plan made anew, None if it is not the one that the job had."""
        try:
            shard_rows, told = int(identity["job"]["shard_rows"]), dict(identity["input"])
        except DAMAGE as error:
            self._say(f"_job.json: can't be understood: {type(error).__name__}: {masked_line(error)}")
            return None
        corpus = plan_shards(
            self._input_folder,
            shard_rows=shard_rows,
            check=lambda schema, where: None,
            read_footers=footers_apart,
            snapshot=told.get("snapshot"),
        )
        found = {"files": len(corpus.files), "rows": corpus.rows, "digest": corpus.digest()}
        for key, value in found.items():
            if told.get(key) != value:
                was = "" if key == "digest" else f": {key} was {told.get(key)!r}, is {value!r}"
                self._say(f"input: {self._input_folder.masked!r} is not what the job ran on{was}")
                return None
        return corpus

    def _read_back(
        self, corpus: ShardPlan, head: dict[str, Any], identity: dict[str, Any], records: Iterator[ShardRecord]
    ) -> None:
        for key in ("job", "input"):
            if head.get(key) != identity.get(key):
                self._say(f"_manifest.json: {key} is not that of _job.json")
        named = {folder: PartNames(corpus.shard_count) for folder in FOLDERS}
        with ThreadPoolExecutor(READERS) as readers:
            in_order = _InOrder(records, self._say)
            for span in spans(corpus.shards()):
                pairs = [(shard, in_order.take(shard.number)) for shard in span]
                tables = read_shards(corpus.folder, span)
                checked = _few_at_once(readers, self._check, zip(pairs, tables, strict=True))
                for (shard, record), (read_bytes, faults) in zip(pairs, checked, strict=True):
                    for fault in faults:
                        self._say(f"shard {shard.number}: {fault}")
                    if record is None:
                        continue
                    self._verdict.shards += 1
                    self._verdict.bytes += read_bytes
                    self._verdict.totals += Totals(
                        record.rows, record.quarantined, record.prompt_tokens, record.completion_tokens
                    )
                    for file in (record.part, record.quarantine):
                        folder, slash, name = file.path.rpartition("/") if file else ("", "", "")
                        if folder + slash in named:
                            named[folder + slash].add(name)
            in_order.skip_to(None)
        if head.get("totals") != asdict(self._verdict.totals):
            self._say(
                f"_manifest.json: totals are {head.get('totals')}, its shards add up to {asdict(self._verdict.totals)}"
            )
        self._find_unnamed(named)

    def _find_unnamed(self, named: dict[str, PartNames]) -> None:
        for folder, counted in named.items():
            for name in self._folder.names(folder.rstrip("/")):
                if name.endswith(".parquet") and name[0] not in "._" and name not in counted:
                    self._say(f"{folder}{name}: is not in the manifest; a reader by file name would see its rows")

    def _check(self, pair: tuple[Shard, ShardRecord | None], table: pa.Table) -> tuple[int, list[str]]:
        """Bytes read and what is wrong with one shard. Runs in a thread of its own."""
        shard, record = pair
        if record is None:
            return 0, ["is not in the manifest"]
        faults = []
        try:
            kept = self._output.record(shard.number)
        except (OSError, HyclusterError) as error:
            faults.append(f"its record in _shards can't be read: {masked_line(error)}")
        else:
            if kept is None:
                faults.append("has no record in _shards")
            elif kept != record:
                faults.append("its record in _shards says otherwise than the manifest")
        if (record.input_file, record.first_row, record.rows) != (shard.file.path, shard.first_row, shard.rows):
            faults.append(
                f"the manifest says rows {record.first_row} to {record.first_row + record.rows} of "
                f"{record.input_file}; by the input it is {shard.first_row} to {shard.first_row + shard.rows} "
                f"of {shard.file.path}"
            )
        seen: Counter[int] = Counter()
        read_bytes = 0
        suffix = self._output.suffix()
        for written, columns in ((record.part, RESULT_COLUMNS), (record.quarantine, REFUSAL_COLUMNS)):
            if written is None:
                if columns is RESULT_COLUMNS and (record.prompt_tokens or record.completion_tokens):
                    faults.append("the manifest counts tokens, but names no part")
                continue
            read_bytes += written.bytes
            part = self._read(written, faults)
            if part is None:
                continue
            faults.extend(f"{written.path}: {fault}" for fault in row_differences(part, columns, suffix, table, seen))
            if columns is RESULT_COLUMNS:
                faults.extend(f"{written.path}: {fault}" for fault in miscounted(part, record, suffix))
        wrong = {"missing": [r for r in range(shard.rows) if not seen[r]], "doubled": [r for r in seen if seen[r] > 1]}
        for what, rows in wrong.items():
            if rows:
                ids = ", ".join(shard.row_id(row) for row in rows[:MOST_ROWS])
                more = f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
                faults.append(f"{len(rows)} rows {what}: {ids}{more}")
        return read_bytes, faults

    def _read(self, written: Written, faults: list[str]) -> pa.Table | None:
        """A named file if it is there, whole and readable; otherwise None, and why."""
        try:
            with self._folder.open_stream(written.path) as stream:
                data = stream.read()
        except FileNotFoundError:
            faults.append(f"{written.path}: is missing")
            return None
        except OSError as error:
            faults.append(f"{written.path}: can't be read: {masked_line(error)}")
            return None
        if len(data) != written.bytes:
            faults.append(f"{written.path}: has {len(data)} bytes; the manifest says {written.bytes}")
        elif hashlib.sha256(data).hexdigest() != written.sha256:
            faults.append(f"{written.path}: its sha256 is not the manifest's: the content was changed")
        try:
            # Not as a dataset, which can't read columns that share a name.
            part = pq.ParquetFile(pa.BufferReader(data)).read()
        except (OSError, pa.ArrowException) as error:
            faults.append(f"{written.path}: is not a readable Parquet file: {masked_line(error)}")
            return None
        if part.num_rows != written.rows:
            faults.append(f"{written.path}: has {part.num_rows} rows; the manifest says {written.rows}")
        return part

    def _json(self, relative: str) -> dict[str, Any] | None:
        try:
            return self._folder.read_json(relative)
        except (OSError, ValueError):
            # Told by the caller: for a proof, a file that can't be read is a file that is missing.
            return None


def _few_at_once(readers: Executor, call: Callable[..., T], arguments: Iterator[tuple[Any, ...]]) -> Iterator[T]:
    """What ``map`` does, which would take in all arguments first."""
    waiting: deque[Future[T]] = deque()
    for some in arguments:
        waiting.append(readers.submit(call, *some))
        if len(waiting) == READERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _InOrder:
    """The manifest's shards, taken one by one by their numbers."""

    def __init__(self, records: Iterator[ShardRecord], say: Callable[[str], None]) -> None:
        self._records = records
        self._say = say
        self._next = next(records, None)

    def take(self, number: int) -> ShardRecord | None:
        self.skip_to(number)
        found = self._next
        if found is None or found.shard != number:
            return None
        self._next = next(self._records, None)
        return found

    def skip_to(self, number: int | None) -> None:
        """Name all that come before ``number``, or all that are left: the plan has no place for them."""
        while self._next is not None and (number is None or self._next.shard < number):
            self._say(f"_manifest.json: shard {self._next.shard} is there twice, out of order or not of this input")
            self._next = next(self._records, None)
