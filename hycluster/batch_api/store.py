"""Where files and batches are kept: a folder or an ``s3://`` prefix, and nothing else.

Layout:
    files/<file>.json     what a file is called and how large it is; written when its content is whole
    content/<file>        its bytes
    batches/<batch>.json  what was asked for
    open/<batch>          empty: the executor has it to do
    cancel/<batch>.json   the wish to cancel
    state/<batch>.json    how far it is
    jobs/<batch>/         input and output of the batch as a job, see runner.py; gone when it has ended
    responses/            not of batches: see hycluster/responses/store.py
    ledger/               nor this: see hycluster/ledger/books.py

Records are written in one step. No two processes write the same one, so ingress processes and executor need no lock;
ids sort by time, so lists read only the records that they show.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

import pyarrow.fs as pafs

from hycluster.auth.caller import Recorded, caller_now, is_own
from hycluster.batch_api.records import BATCH_ID, FILE_ID, Batch, Record, State, StoredFile, new_record_id
from hycluster.errors import InvalidInput, NotFound, shown
from hycluster.settings.ingress import Batches
from hycluster.storage import WritableFolder, leftover_of, locate

CHUNK_BYTES = 1 << 20
READERS = 16
# Age of what never got its record; no upload takes longer.
ORPHAN_S = 86400.0

R = TypeVar("R", bound=Record)


class Store:
    """All files and batches of a service; where callers are known, those of the current one's project. Every method
    blocks; any number of processes may use one folder."""

    def __init__(self, settings: Batches) -> None:
        self._keep_s = None if settings.keep_days is None else round(settings.keep_days * 86400)
        self.folder = locate(settings.place, "batches.store").writable()

    # -- files --------------------------------------------------------------------------------------

    def add_file(self, content: BinaryIO, filename: str, expires_after_s: int | None = None) -> StoredFile:
        """Take in an uploaded file.

        Raises:
            InvalidInput: it is empty.
        """
        file_id = new_record_id("file-")
        size = self.write_content(file_id, iter(lambda: content.read(CHUNK_BYTES), b""))
        if not size:
            self.folder.delete([f"content/{file_id}"])
            raise InvalidInput("file: is empty; must be JSONL, one request per line")
        return self.register(file_id, size, filename, "batch", expires_after_s, caller_now())

    def write_content(self, file_id: str, chunks: Iterator[bytes]) -> int:
        """Write a file's bytes, over those of an earlier attempt; nobody sees them before ``register``."""
        self.folder.make("content")
        size = 0
        with self.folder.writing(f"content/{file_id}") as stream:
            for chunk in chunks:
                stream.write(chunk)
                size += len(chunk)
        return size

    def register(
        self,
        file_id: str,
        size: int,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        caller: Recorded = None,
    ) -> StoredFile:
        """Let callers see a file whose content is whole."""
        now = int(time.time())
        lasts_s = self._keep_s if expires_after_s is None else expires_after_s
        file = StoredFile.model_validate(
            {
                "id": file_id,
                "bytes": size,
                "created_at": now,
                # The name alone: some clients send the path.
                "filename": PurePosixPath(filename.replace("\\", "/")).name[:255] or file_id,
                "purpose": purpose,
                "expires_at": None if lasts_s is None else now + lasts_s,
                "caller": caller,
            }
        )
        self._put("files", file_id, file)
        return file

    def file(self, file_id: str) -> StoredFile:
        """Look up a file.

        Raises:
            NotFound: there is none, or it has expired, or is another project's.
        """
        file = self._get("files", file_id, StoredFile) if FILE_ID.fullmatch(file_id) else None
        if file is None or _expired(file) or not is_own(file.caller):
            raise NotFound(f"file_id: there is no file {shown(file_id)}")
        return file

    def open_content(self, file_id: str) -> pafs.NativeFile:
        """A file's bytes, to be read in order and closed.

        Raises:
            NotFound: there is none.
        """
        try:
            return self.folder.open_stream(f"content/{file_id}")
        except FileNotFoundError:
            raise NotFound(f"file_id: file {shown(file_id)} has been deleted") from None

    def chunks(self, content: pafs.NativeFile) -> Iterator[bytes]:
        """What ``open_content`` gave, a piece at a time."""
        with closing(content):
            while chunk := content.read(CHUNK_BYTES):
                yield chunk

    def delete_file(self, file_id: str) -> None:
        """Delete a file; callers see it no more before its bytes go."""
        self.folder.delete([f"files/{file_id}.json", f"content/{file_id}"])

    def list_files(self, after: str | None, limit: int, *, purpose: str | None, newest_first: bool) -> list[StoredFile]:
        """Files in the order in which they were made, those behind ``after``."""

        def wanted(file: StoredFile) -> bool:
            return purpose in (None, file.purpose) and not _expired(file) and is_own(file.caller)

        return self._list("files", after, limit, StoredFile, newest_first, wanted)

    # -- batches ------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> None:
        """Take in a batch; the executor finds it by its mark in ``open/``."""
        # The mark first: a batch without one would wait for ever, a mark without a batch harms nobody.
        self._create("open", batch.id, b"")
        self._put("batches", batch.id, batch)

    def batch(self, batch_id: str) -> Batch:
        """Look up a batch.

        Raises:
            NotFound: there is none, or it is another project's.
        """
        batch = self._get("batches", batch_id, Batch) if BATCH_ID.fullmatch(batch_id) else None
        if batch is None or not is_own(batch.caller):
            raise NotFound(f"batch_id: there is no batch {shown(batch_id)}")
        return batch

    def list_batches(self, after: str | None, limit: int) -> list[Batch]:
        """Batches, newest first, those behind ``after``."""
        return self._list("batches", after, limit, Batch, True, lambda batch: is_own(batch.caller))

    def state(self, batch_id: str) -> State:
        return self._get("state", batch_id, State) or State()

    def save_state(self, batch_id: str, state: State) -> None:
        self._put("state", batch_id, state)

    def cancel(self, batch_id: str) -> None:
        """Ask for the end of a batch; the first time counts."""
        self._create("cancel", f"{batch_id}.json", json.dumps({"at": int(time.time())}).encode())

    def cancelling_at(self, batch_id: str) -> int | None:
        """When the end of a batch was asked for, in seconds since the epoch; None if it was not."""
        wish = self.folder.read_whole(f"cancel/{batch_id}.json")
        return None if wish is None else int(json.loads(wish)["at"])

    def open_batches(self) -> list[str]:
        """Ids of the batches that the executor has to do, oldest first."""
        return sorted(name for name in self.folder.names("open") if BATCH_ID.fullmatch(name))

    def close_batch(self, batch_id: str) -> None:
        """The batch has ended: drop its work, then its mark."""
        # An earlier attempt may have got as far as this.
        with suppress(FileNotFoundError):
            self.folder.delete_tree(f"jobs/{batch_id}")
        self.folder.delete([f"open/{batch_id}"])

    def work(self, batch_id: str) -> WritableFolder:
        """The folder for a batch's work."""
        return self.folder.below(f"jobs/{batch_id}")

    # -- upkeep -------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Delete expired files, and what ingress processes left behind that died in between."""
        for name in list(self.folder.names("files")):
            file = self._get("files", name.removesuffix(".json"), StoredFile) if leftover_of(name) is None else None
            if file is not None and _expired(file):
                self.delete_file(file.id)
        for folder, records in (("content", "files"), ("open", "batches")):
            known = set(self.folder.names(records))
            orphans = [
                f"{folder}/{info.base_name}"
                for info in self.folder.entries(folder)
                if f"{info.base_name}.json" not in known and (info.mtime_ns or 0) / 1e9 < time.time() - ORPHAN_S
            ]
            self.folder.delete(orphans)

    # -- records ------------------------------------------------------------------------------------

    def _put(self, folder: str, name: str, record: Record) -> None:
        self.folder.make(folder)
        self.folder.replace(f"{folder}/{name}.json", record.model_dump_json().encode())

    def _create(self, folder: str, name: str, data: bytes) -> None:
        self.folder.make(folder)
        self.folder.create(f"{folder}/{name}", data)

    def _get(self, folder: str, name: str, kind: type[R]) -> R | None:
        data = self.folder.read_whole(f"{folder}/{name}.json")
        return None if data is None else kind.model_validate_json(data)

    def _list(
        self,
        folder: str,
        after: str | None,
        limit: int,
        kind: type[R],
        newest_first: bool,
        wanted: Callable[[R], bool],
    ) -> list[R]:
        held = (name for name in self.folder.names(folder) if leftover_of(name) is None)
        ids = sorted((name.removesuffix(".json") for name in held), reverse=newest_first)
        if after is not None:
            ids = [name for name in ids if (name < after if newest_first else name > after)]
        found: list[R] = []
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(ids), page := max(limit, READERS)):
                records = readers.map(lambda name: self._get(folder, name, kind), ids[start : start + page])
                found += [record for record in records if record is not None and wanted(record)]
                if len(found) >= limit:
                    break
        return found[:limit]


def _expired(file: StoredFile) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()
