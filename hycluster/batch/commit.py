"""The output folder: what is written, and what of it counts.

Layout:
    _job.json                                   whose output this is, written before anything else
    part-<shard>-<attempt>.parquet              results of one attempt at one shard
    quarantine/part-<shard>-<attempt>.parquet   rows of that attempt that got no result
    _shards/<shard>.json                        the attempt that counts: created once, first finisher wins
    _manifest.json                              all parts that count, written when all shards are done
    _SUCCESS                                    last

Attempt files have unique names and are never changed, so any number of attempts at a shard may
run and die; the shard's record picks one. Generation is at least once, commit exactly once, as
far as ``storage.create_if_absent`` holds (see there for object stores).
"""

from __future__ import annotations

import hashlib
import io
import json
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
from hycluster.batch.storage import create_if_absent, exists, locate, one_line, read_json, write
from hycluster.errors import SettingsError

Identity = dict[str, Any]


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
    settings = job.model_dump(mode="json", include={"model", "task", "prompt", "question", "sampling", "shard_rows"})
    return {
        "job": {**settings, "columns": job.input.columns.model_dump(), "prompts_version": VERSION},
        "input": {"files": len(plan.files), "rows": plan.rows, "digest": plan.digest()},
    }


class Output:
    """The output folder of one job. Small and picklable: every process that commits has one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._root = locate(path, "output.path")

    def finished(self, mine: Identity) -> bool:
        """Whether this very job has been here and finished. Writes nothing.

        Raises:
            SettingsError: the folder holds something else, with the difference named, or can't be read.
        """
        try:
            if self._filesystem.get_file_info(self._root).type == pafs.FileType.File:
                raise SettingsError(f"output.path: {self.path!r} is a file; must be a folder")
            theirs = read_json(self._filesystem, self._at("_job.json"))
            if theirs is None:
                self._refuse_foreign()
                return False
        except (OSError, json.JSONDecodeError) as error:
            raise SettingsError(f"output.path: {self.path!r} can't be used: {one_line(error)}") from None
        differences = list(_differences(theirs, mine))
        if differences:
            raise SettingsError(
                f"output.path: {self.path!r} holds the output of another job or input; give another folder "
                f"({'; '.join(differences)})"
            )
        return exists(self._filesystem, self._at("_SUCCESS"))

    def claim(self, mine: Identity) -> None:
        """Make the folder this job's, unless it is already.

        Raises:
            SettingsError: it can't be written, or another job was faster.
        """
        try:
            # Object stores have no folders; making them there leaves marker objects.
            if isinstance(self._filesystem, pafs.LocalFileSystem):
                for folder in ("", "quarantine", "_shards"):
                    self._filesystem.create_dir(self._at(folder), recursive=True)
            create_if_absent(self._filesystem, self._at("_job.json"), json.dumps(mine, indent=1).encode())
        except OSError as error:
            raise SettingsError(f"output.path: {self.path!r} can't be written: {one_line(error)}") from None
        self.finished(mine)

    def done(self) -> set[int]:
        """Numbers of the shards that are committed."""
        folder = pafs.FileSelector(self._at("_shards"), allow_not_found=True)
        names = (info.base_name for info in self._filesystem.get_file_info(folder))
        return {int(name.removesuffix(".json")) for name in names if not name.startswith(".")}

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a committed shard, None if it is not committed."""
        data = read_json(self._filesystem, self._at(_record_name(shard)))
        return ShardRecord.from_dict(data) if data else None

    def records(self) -> Iterator[ShardRecord]:
        """The records of all committed shards in order, one at a time."""
        for shard in sorted(self.done()):
            record = self.record(shard)
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
        if create_if_absent(self._filesystem, self._at(_record_name(shard)), mine.to_json().encode()):
            return mine
        return self.record(shard) or mine

    def finish(self, mine: Identity, totals: dict[str, Any]) -> None:
        """Write the manifest, delete what attempts without a record left behind, then say ``_SUCCESS``."""
        counted = {"_manifest.json", "_SUCCESS", "_job.json"}
        with self._filesystem.open_output_stream(self._at("_manifest.json")) as stream:
            head = json.dumps({"version": 1, **mine, "totals": totals})
            stream.write(head[:-1].encode() + b', "shards": [')
            for position, record in enumerate(self.records()):
                stream.write((",\n" if position else "\n").encode() + record.to_json().encode())
                counted.update(file.path for file in (record.part, record.quarantine) if file)
            stream.write(b"\n]}\n")
        for folder in ("", "quarantine"):
            for info in self._filesystem.get_file_info(pafs.FileSelector(self._at(folder), allow_not_found=True)):
                relative = f"{folder}/{info.base_name}".lstrip("/")
                if info.base_name.startswith("part-") and relative not in counted:
                    self._filesystem.delete_file(info.path)
        write(self._filesystem, self._at("_SUCCESS"), b"")

    def is_input(self, plan: Plan) -> bool:
        """Whether the parts written here would become rows of that input."""
        return plan.takes(self._filesystem, self._at("part-.parquet"))

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
            foreign = [name for name in held if name not in ("quarantine", "_shards") and not name.startswith("._job")]
            if foreign:
                raise SettingsError(
                    f"output.path: {self.path!r} holds files that no job of hycluster wrote ({foreign[0]!r}); "
                    "give an empty or a new folder"
                )


def _record_name(shard: int) -> str:
    return f"_shards/{shard:08d}.json"


def _total(table: pa.Table, column: str) -> int:
    return sum(table.column(column).to_pylist())


def _differences(theirs: Any, mine: Any, where: str = "") -> Iterator[str]:
    """One line for each value that differs, by its dotted key."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in dict.fromkeys([*theirs, *mine]):
            yield from _differences(theirs.get(key), mine.get(key), f"{where}.{key}".lstrip("."))
    elif theirs != mine:
        if where == "input.digest":
            yield "the input's files differ"
        else:
            yield f"{where.removeprefix('job.')}: was {theirs!r}, is {mine!r}"
