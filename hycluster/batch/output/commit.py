"""The output folder: what is written, and what of it counts.

Layout:
    _coordinator/<n>.json                       who is at work here, see lease.py; gone at the end
    _job.json                                   whose output this is, and which edition
    part-<shard>-<attempt>.parquet              results of one attempt at one shard
    _quarantine/part-<shard>-<attempt>.parquet  rows of that attempt that got no result
    _shards/<shard>-<edition>.json              the attempt that counts: created once, first finisher wins
    _answers/<process>-<edition>.json           answers of shards in work, see kept.py; gone at the end
    _progress.json                              what a running job says of itself, see progress.py
    _report.html, _report.json                  what it all came to, see page.py and figures.py
    _manifest.json                              all parts that count, written when all shards are done
    .huggingface.yaml                           tells Hugging Face's datasets which files are rows
    _SUCCESS                                    last

All but the parts begins with ``_`` or ``.``, which pandas, pyarrow and Spark pass by: they see the parts and nothing
else. ``datasets`` would take the JSON files for the data, had it not a file of its own to go by.

Attempt files have unique names and are never changed, so any number of attempts at a shard may
run and die; the shard's record picks one. Generation is at least once, commit exactly once.

``clear`` makes room for another job and begins a new edition. Processes of the job before it, which
may not know yet that they are to stop, write records of the old edition, which nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from hycluster.batch.input.corpus import ROW_ID, SHARD_BYTES, ShardPlan
from hycluster.batch.input.tables import as_parquet, last
from hycluster.batch.output.identity import Identity, identity_differences, suffix_in
from hycluster.batch.output.record import DAMAGE, ShardRecord, Written
from hycluster.batch.output.shard_set import PartNames, ShardSet
from hycluster.errors import JobFailed, SettingsError
from hycluster.storage import Folder, leftover_of, masked_line

# What is made from the records, beside _job.json, which says whose they are.
HUGGING_FACE = ".huggingface.yaml"
DERIVED = ("_SUCCESS", "_manifest.json", HUGGING_FACE, "_report.html", "_report.json", "_progress.json")
QUARANTINE = "_quarantine"
ANSWERS = "_answers"
# The same as they were called before readers were thought of. Outputs that have them are still resumed and verified.
OLD_QUARANTINE = "quarantine"
OLD_DERIVED = ("report.html", "report.json")
# https://huggingface.co/docs/hub/datasets-manual-configuration; datasets reads it in a folder on a disk, too.
DATASET = b"configs:\n- config_name: default\n  data_files: part-*.parquet\n"
_ATTEMPT = re.compile(r"part-\d{8}-[0-9a-f]{12}\.parquet")
_KEPT = re.compile(r"[0-9a-f]{12}-[0-9a-f]{12}\.json")
_RECORD = re.compile(r"\d{8}-[0-9a-f]{12}\.json")


class OutputFolder:
    """The output folder of one job. Small and picklable: every process that commits has one.

    Raises:
        SettingsError: nothing can be created there only if it is absent.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder.writable()
        self._edition: str | None = None
        self._suffix = ""

    def check_store(self) -> None:
        """Raise SettingsError where two attempts at a shard could both come to count, or if it can't be written."""
        try:
            self.folder.check_creates_once("_job.json")
        except OSError as error:
            raise self._not_writable(error) from None

    def finished(self, mine: Identity) -> bool:
        """Whether this very job has been here and finished. Writes nothing.

        Raises:
            SettingsError: the folder holds something else, with the difference named, or can't be read.
        """
        theirs = self._owner()
        if theirs is None:
            return False
        found = list(identity_differences(theirs, mine))
        if found:
            raise SettingsError(
                f"output.path: {self.folder.masked!r} holds the output of another job or input; give another folder "
                f"or --overwrite ({'; '.join(found)})"
            )
        return self.folder.exists("_SUCCESS")

    def foreign(self, mine: Identity) -> bool:
        """Whether the folder is the output of another job or input."""
        theirs = self._owner()
        return theirs is not None and any(identity_differences(theirs, mine))

    def clear(self, mine: Identity) -> None:
        """Delete what another job has written here, and nothing else; then the folder is this job's.

        Cut off at any point it leaves an output of the old job that is not finished and in itself right.
        """
        self.folder.delete(["_SUCCESS"])
        # Records before what they point to.
        for folder in (ANSWERS, "_shards", "", QUARANTINE, OLD_QUARANTINE):
            found = [name for name in self.folder.names(folder) if _is_output(folder, name)]
            self.folder.delete(_join(folder, name) for name in found)
        # In one step, so that there is no moment at which the folder is nobody's.
        self.folder.replace("_job.json", _job_file(mine))
        self._edition = None

    def claim(self, mine: Identity) -> bool:
        """Make the folder this job's, unless it is already.

        Returns:
            Whether the job is finished; another run of it may have just been here.

        Raises:
            SettingsError: it can't be written, or another job was faster.
        """
        try:
            for folder in ("", QUARANTINE, "_shards"):
                self.folder.make(folder)
            self.folder.create("_job.json", _job_file(mine))
        except OSError as error:
            raise self._not_writable(error) from None
        # Pinned: what this run and its processes write belongs to this edition, whatever becomes of the folder.
        self._edition = None
        self.edition()
        return self.finished(mine)

    def edition(self) -> str:
        """Which start of a job on this folder: the one that was there when this object first looked."""
        if self._edition is None:
            owner = self.folder.read_json("_job.json")
            if owner is None:
                return ""
            self._edition = str(owner.get("edition", ""))
            self._suffix = suffix_in(owner)
        return self._edition

    def suffix(self) -> str:
        """What the names of the columns that the job adds end with."""
        self.edition()
        return self._suffix

    def done(self) -> ShardSet:
        """Numbers of the shards that are committed."""
        end = f"-{self.edition()}.json"
        found = self.folder.names("_shards")
        return ShardSet(int(name.removesuffix(end)) for name in found if name.endswith(end))

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a committed shard, None if it is not committed."""
        return self._read_record(shard, self.edition())

    def records(self) -> Iterator[ShardRecord]:
        """The records of all committed shards in order, one at a time."""
        edition = self.edition()
        for shard in self.done():
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
        tokens = [_total(results, name) for name in ("prompt_tokens", "completion_tokens")]
        results, quarantined = self._named(results), self._named(quarantined)
        attempt = uuid.uuid4().hex[:12]
        input_file, _, first_row = row_id.rpartition("#")
        name = f"part-{shard:08d}-{attempt}.parquet"
        mine = ShardRecord(
            shard=shard,
            input_file=input_file,
            first_row=int(first_row),
            rows=results.num_rows + quarantined.num_rows,
            part=self._write(name, results),
            quarantine=self._write(f"{QUARANTINE}/{name}", quarantined),
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            begun_at=begun_at,
            committed_at=time.time(),
        )
        if self.folder.create(_record_name(shard, self.edition()), mine.to_json().encode()):
            return mine
        return self.record(shard) or mine

    def finish(self, mine: Identity, totals: dict[str, Any]) -> None:
        """Write the manifest, delete what attempts without a record left behind, then say ``_SUCCESS``."""
        shards = max(self.done(), default=-1) + 1
        parts, quarantine = PartNames(shards), PartNames(shards)
        with self.folder.writing("_manifest.json") as stream:
            head = json.dumps({"version": 1, **mine, "totals": totals})
            stream.write(head[:-1].encode() + b', "shards": [')
            for position, record in enumerate(self.records()):
                stream.write((",\n" if position else "\n").encode() + record.to_json().encode())
                if record.part:
                    parts.add(record.part.path)
                if record.quarantine:
                    quarantine.add(record.quarantine.path.rpartition("/")[2])
            stream.write(b"\n]}\n")
        for folder, counted in (
            ("", parts), (QUARANTINE, quarantine), (OLD_QUARANTINE, quarantine), ("_shards", None)
        ):  # fmt: skip
            found = self.folder.names(folder)
            # Listed to the end before the first is deleted.
            self.folder.delete([_join(folder, name) for name in found if self._is_orphan(folder, name, counted)])
        self.folder.delete([_join(ANSWERS, name) for name in self.folder.names(ANSWERS) if _is_output(ANSWERS, name)])
        self.folder.write(HUGGING_FACE, DATASET)
        self.folder.write("_SUCCESS", b"")

    def is_input(self, plan: ShardPlan) -> bool:
        """Whether the parts written here would become rows of that input."""
        return plan.takes(self.folder, "part-.parquet")

    def _owner(self) -> Identity | None:
        """Whose output this is; None if it is nobody's yet."""
        try:
            if self.folder.info().type == pafs.FileType.File:
                raise SettingsError(f"output.path: {self.folder.masked!r} is a file; must be a folder")
            theirs = self.folder.read_json("_job.json")
            if theirs is None:
                self._refuse_foreign()
        except (OSError, json.JSONDecodeError) as error:
            raise SettingsError(f"output.path: {self.folder.masked!r} can't be used: {masked_line(error)}") from None
        return theirs

    def _is_orphan(self, folder: str, name: str, counted: PartNames | None) -> bool:
        if leftover_of(name) is not None:
            return _is_output(folder, name) or (not folder and leftover_of(name) == "_job.json")
        if counted is None:
            return _is_output(folder, name) and not name.endswith(f"-{self.edition()}.json")
        return bool(_ATTEMPT.fullmatch(name)) and name not in counted

    def _read_record(self, shard: int, edition: str) -> ShardRecord | None:
        name = _record_name(shard, edition)
        try:
            data = self.folder.read_json(name)
            return None if data is None else ShardRecord.from_dict(data)
        except DAMAGE as error:
            # Not taken for absent: nothing here leaves such a file, so nobody knows what else is wrong.
            raise JobFailed(
                f"output.path: {self.folder.masked!r}: {name} is damaged ({masked_line(error)}); delete it and run the "
                "same command again: its shard is generated anew"
            ) from None

    def _not_writable(self, error: OSError) -> SettingsError:
        return SettingsError(f"output.path: {self.folder.masked!r} can't be written: {masked_line(error)}")

    def _named(self, table: pa.Table) -> pa.Table:
        """With our columns' names as the job has them, from the row's id on."""
        begin = table.schema.get_all_field_indices(ROW_ID)[-1]
        names = table.schema.names
        return table.rename_columns([*names[:begin], *(f"{name}{self.suffix()}" for name in names[begin:])])

    def _write(self, relative: str, table: pa.Table) -> Written | None:
        if not table.num_rows:
            return None
        # The least and the greatest of very large cells are of use to nobody, and take three times their size to find.
        data = as_parquet(table, write_statistics=table.get_total_buffer_size() <= SHARD_BYTES)
        self.folder.write(relative, data)
        return Written(relative, table.num_rows, len(data), hashlib.sha256(data).hexdigest())

    def _refuse_foreign(self) -> None:
        held = sorted(found.base_name for found in self.folder.entries())
        # An earlier start may have died between making the folders and saying whose they are.
        ours = (QUARANTINE, OLD_QUARANTINE, ANSWERS, "_shards", "_coordinator")
        foreign = [name for name in held if name not in ours and leftover_of(name) != "_job.json"]
        if foreign:
            raise SettingsError(
                f"output.path: {self.folder.masked!r} holds files that no job of hycluster wrote ({foreign[0]!r}); "
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
    if folder == ANSWERS:
        return bool(_KEPT.fullmatch(name))
    if folder == "_shards":
        return bool(_RECORD.fullmatch(name))
    return bool(_ATTEMPT.fullmatch(name)) or (not folder and name in DERIVED + OLD_DERIVED)


def _total(table: pa.Table, column: str) -> int:
    return sum(last(table, column).to_pylist())
