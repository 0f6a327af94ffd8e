"""The output folder: what is written, and what of it counts.

Layout:
    _coordinator/<n>.json                       who is at work here, see lease.py; gone at the end
    _job.json                                   whose output this is, and which edition
    part-<shard>-<attempt>.parquet              results of one attempt at one shard
    quarantine/part-<shard>-<attempt>.parquet   rows of that attempt that got no result
    _shards/<shard>-<edition>.json              the attempt that counts: created once, first finisher wins
    _progress.json                              what a running job says of itself, see progress.py
    report.html, report.json                    what it all came to, see page.py and figures.py
    _manifest.json                              all parts that count, written when all shards are done
    _SUCCESS                                    last

Attempt files have unique names and are never changed, so any number of attempts at a shard may
run and die; the shard's record picks one. Generation is at least once, commit exactly once.

``clear`` makes room for another job and begins a new edition. Processes of the job before it, which
may not know yet that they are to stop, write records of the old edition, which nobody reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hycluster.batch.corpus import Plan
from hycluster.batch.job import Job
from hycluster.batch.prompts import VERSION
from hycluster.batch.storage import (
    check_exclusive,
    create_if_absent,
    delete,
    exists,
    leftover_of,
    locate,
    names,
    one_line,
    read_json,
    replace,
    write,
)
from hycluster.errors import SettingsError

Identity = dict[str, Any]

# What is made from the records, beside _job.json, which says whose they are.
DERIVED = ("_SUCCESS", "_manifest.json", "report.html", "report.json", "_progress.json")
_ATTEMPT = re.compile(r"part-\d{8}-[0-9a-f]{12}\.parquet")
_RECORD = re.compile(r"\d{8}-[0-9a-f]{12}\.json")


@dataclass(frozen=True, slots=True)
class Written:
    """One immutable Parquet file, its path relative to the output."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What became of one shard. ``part`` and ``quarantine`` are None where they would have no rows.

    ``begun_at`` (its first row went to the engines) and ``committed_at`` are seconds since the epoch, by the
    clock of the machine that did it.
    """

    shard: int
    input_file: str
    first_row: int
    rows: int
    part: Written | None
    quarantine: Written | None
    prompt_tokens: int
    completion_tokens: int
    begun_at: float
    committed_at: float

    @property
    def quarantined(self) -> int:
        return self.quarantine.rows if self.quarantine else 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardRecord:
        files = {key: Written(**data[key]) if data[key] else None for key in ("part", "quarantine")}
        return cls(**{**data, **files})


def identity(job: Job, plan: Plan) -> Identity:
    """All that the output depends on: two runs with equal identities may work on one output."""
    fields = {"model", "task", "prompt", "question", "summary", "sampling", "shard_rows"}
    settings = job.model_dump(mode="json", include=fields)
    return {
        "job": {**settings, "columns": job.input.columns.model_dump(), "prompts_version": VERSION},
        "input": {
            "files": len(plan.files),
            "rows": plan.rows,
            "shards": plan.shard_count,
            "digest": plan.digest(),
        },
    }


class Output:
    """The output folder of one job. Small and picklable: every process that commits has one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._root = locate(path, "output.path")
        check_exclusive(self._filesystem, path)
        self._edition: str | None = None

    def finished(self, mine: Identity) -> bool:
        """Whether this very job has been here and finished. Writes nothing.

        Raises:
            SettingsError: the folder holds something else, with the difference named, or can't be read.
        """
        theirs = self._owner()
        if theirs is None:
            return False
        differences = list(_differences(theirs, mine))
        if differences:
            raise SettingsError(
                f"output.path: {self.path!r} holds the output of another job or input; give another folder "
                f"or --overwrite ({'; '.join(differences)})"
            )
        return exists(self._filesystem, self._at("_SUCCESS"))

    def foreign(self, mine: Identity) -> bool:
        """Whether the folder is the output of another job or input."""
        theirs = self._owner()
        return theirs is not None and any(_differences(theirs, mine))

    def clear(self, mine: Identity) -> None:
        """Delete what another job has written here, and nothing else; then the folder is this job's.

        Cut off at any point it leaves an output of the old job that is not finished and in itself right.
        """
        delete(self._filesystem, [self._at("_SUCCESS")])
        # Records before what they point to.
        for folder in ("_shards", "", "quarantine"):
            found = names(self._filesystem, self._at(folder))
            delete(self._filesystem, (self._at(_join(folder, name)) for name in found if _is_output(folder, name)))
        # In one step, so that there is no moment at which the folder is nobody's.
        replace(self._filesystem, self._at("_job.json"), _job_file(mine))
        self._edition = None

    def claim(self, mine: Identity) -> bool:
        """Make the folder this job's, unless it is already.

        Returns:
            Whether the job is finished; another run of it may have just been here.

        Raises:
            SettingsError: it can't be written, or another job was faster.
        """
        try:
            # Object stores have no folders; making them there leaves marker objects.
            if isinstance(self._filesystem, pafs.LocalFileSystem):
                for folder in ("", "quarantine", "_shards"):
                    self._filesystem.create_dir(self._at(folder), recursive=True)
            create_if_absent(self._filesystem, self._at("_job.json"), _job_file(mine))
        except OSError as error:
            raise SettingsError(f"output.path: {self.path!r} can't be written: {one_line(error)}") from None
        # Pinned: what this run and its processes write belongs to this edition, whatever becomes of the folder.
        self._edition = None
        self.edition()
        return self.finished(mine)

    def edition(self) -> str:
        """Which start of a job on this folder: the one that was there when this object first looked."""
        if self._edition is None:
            owner = read_json(self._filesystem, self._at("_job.json"))
            if owner is None:
                return ""
            self._edition = str(owner.get("edition", ""))
        return self._edition

    def done(self) -> set[int]:
        """Numbers of the shards that are committed."""
        end = f"-{self.edition()}.json"
        found = names(self._filesystem, self._at("_shards"))
        return {int(name.removesuffix(end)) for name in found if name.endswith(end)}

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a committed shard, None if it is not committed."""
        return self._read_record(shard, self.edition())

    def records(self) -> Iterator[ShardRecord]:
        """The records of all committed shards in order, one at a time."""
        edition = self.edition()
        for shard in sorted(self.done()):
            record = self._read_record(shard, edition)
            if record is not None:
                yield record

    def commit(
        self, shard: int, row_id: str, results: pa.Table, quarantined: pa.Table, *, begun_at: float
    ) -> ShardRecord:
        """Write one attempt at a shard and its record.

        Args:
            row_id: of the shard's first row.
            results: finished rows in input order; ``quarantined``: those that got no result.

        Returns:
            The record that counts: this attempt's, or that of an attempt that finished first.
        """
        attempt = uuid.uuid4().hex[:12]
        input_file, _, first_row = row_id.rpartition("#")
        name = f"part-{shard:08d}-{attempt}.parquet"
        mine = ShardRecord(
            shard=shard,
            input_file=input_file,
            first_row=int(first_row),
            rows=results.num_rows + quarantined.num_rows,
            part=self._write(name, results),
            quarantine=self._write(f"quarantine/{name}", quarantined),
            prompt_tokens=_total(results, "prompt_tokens"),
            completion_tokens=_total(results, "completion_tokens"),
            begun_at=begun_at,
            committed_at=time.time(),
        )
        record = _record_name(shard, self.edition())
        if create_if_absent(self._filesystem, self._at(record), mine.to_json().encode()):
            return mine
        return self.record(shard) or mine

    def finish(self, mine: Identity, totals: dict[str, Any]) -> None:
        """Write the manifest, delete what attempts without a record left behind, then say ``_SUCCESS``."""
        counted: set[str] = set()
        with self._filesystem.open_output_stream(self._at("_manifest.json")) as stream:
            head = json.dumps({"version": 1, **mine, "totals": totals})
            stream.write(head[:-1].encode() + b', "shards": [')
            for position, record in enumerate(self.records()):
                stream.write((",\n" if position else "\n").encode() + record.to_json().encode())
                counted.update(file.path for file in (record.part, record.quarantine) if file)
            stream.write(b"\n]}\n")
        for folder in ("", "quarantine", "_shards"):
            paths = [_join(folder, name) for name in names(self._filesystem, self._at(folder))]
            delete(self._filesystem, (self._at(path) for path in paths if self._is_orphan(path, counted)))
        write(self._filesystem, self._at("_SUCCESS"), b"")

    def is_input(self, plan: Plan) -> bool:
        """Whether the parts written here would become rows of that input."""
        return plan.takes(self._filesystem, self._at("part-.parquet"))

    def _owner(self) -> Identity | None:
        """Whose output this is; None if it is nobody's yet."""
        try:
            if self._filesystem.get_file_info(self._root).type == pafs.FileType.File:
                raise SettingsError(f"output.path: {self.path!r} is a file; must be a folder")
            theirs = read_json(self._filesystem, self._at("_job.json"))
            if theirs is None:
                self._refuse_foreign()
        except (OSError, json.JSONDecodeError) as error:
            raise SettingsError(f"output.path: {self.path!r} can't be used: {one_line(error)}") from None
        return theirs

    def _is_orphan(self, path: str, counted: set[str]) -> bool:
        folder, _, name = path.rpartition("/")
        if leftover_of(name) is not None:
            return _is_output(folder, name) or leftover_of(path) == "_job.json"
        if folder == "_shards":
            return _is_output(folder, name) and not name.endswith(f"-{self.edition()}.json")
        return bool(_ATTEMPT.fullmatch(name)) and path not in counted

    def _read_record(self, shard: int, edition: str) -> ShardRecord | None:
        data = read_json(self._filesystem, self._at(_record_name(shard, edition)))
        return ShardRecord.from_dict(data) if data else None

    def _at(self, relative: str) -> str:
        return f"{self._root}/{relative}" if relative else self._root

    def _write(self, relative: str, table: pa.Table) -> Written | None:
        if not table.num_rows:
            return None
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        data = buffer.getbuffer()
        write(self._filesystem, self._at(relative), data)
        return Written(relative, table.num_rows, len(data), hashlib.sha256(data).hexdigest())

    def _refuse_foreign(self) -> None:
        info = self._filesystem.get_file_info(self._root)
        if info.type == pafs.FileType.Directory:
            held = sorted(found.base_name for found in self._filesystem.get_file_info(pafs.FileSelector(self._root)))
            # An earlier start may have died between making the folders and saying whose they are.
            ours = ("quarantine", "_shards", "_coordinator")
            foreign = [name for name in held if name not in ours and leftover_of(name) != "_job.json"]
            if foreign:
                raise SettingsError(
                    f"output.path: {self.path!r} holds files that no job of hycluster wrote ({foreign[0]!r}); "
                    "give an empty or a new folder"
                )


def _record_name(shard: int, edition: str) -> str:
    return f"_shards/{shard:08d}-{edition}.json"


def _job_file(mine: Identity) -> bytes:
    return json.dumps({"edition": uuid.uuid4().hex[:12], **mine}, indent=1).encode()


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_output(folder: str, name: str) -> bool:
    """Whether a file was written by a job of hycluster, or is what is left of such a write."""
    name = leftover_of(name) or name
    if folder == "_shards":
        return bool(_RECORD.fullmatch(name))
    return bool(_ATTEMPT.fullmatch(name)) or (not folder and name in DERIVED)


def _total(table: pa.Table, column: str) -> int:
    return sum(table.column(column).to_pylist())


def _differences(theirs: Any, mine: Any, where: str = "") -> Iterator[str]:
    """One line for each value that differs, by its dotted key."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in dict.fromkeys([*theirs, *mine]):
            if not where and key == "edition":
                continue
            yield from _differences(theirs.get(key), mine.get(key), f"{where}.{key}".lstrip("."))
    elif theirs != mine:
        if where == "input.digest":
            yield "the input's files differ"
        else:
            yield f"{where.removeprefix('job.')}: was {theirs!r}, is {mine!r}"
