"""A folder on a disk. A file and the folder that names it are flushed (``fsync``) before a write returns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hycluster.storage.folder import WritableFolder, temporary


class DiskFolder(WritableFolder):
    """Written with the operating system's own calls: no library flushes what it writes and the name of it."""

    def create(self, path: str, data: bytes) -> bool:
        # The name is given to a file that is whole and on the disk: no power cut leaves a torn one under it.
        held = self._write_temporary(path, data)
        try:
            os.link(held, self.at(path))
        except FileExistsError:
            return False
        finally:
            held.unlink(missing_ok=True)
            _sync_folder(held.parent)
        return True

    def check_creates_once(self, path: str) -> None:
        """A hard link is not made over a file."""

    @contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        target = Path(self.at(path))
        with target.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(target.parent)

    def write(self, path: str, data: bytes | memoryview) -> None:
        with self.writing(path) as stream:
            stream.write(data)

    def replace(self, path: str, data: bytes) -> None:
        held = self._write_temporary(path, data)
        held.replace(self.at(path))
        _sync_folder(held.parent)

    def read_whole(self, path: str) -> bytes | None:
        try:
            return Path(self.at(path)).read_bytes()
        except FileNotFoundError:
            return None

    def make(self, path: str = "") -> None:
        folder = Path(self.at(path))
        new = [made for made in (folder, *folder.parents) if not made.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in new:
            _sync_folder(made.parent)

    def delete(self, paths: Iterable[str]) -> None:
        folders: set[Path] = set()
        for path in paths:
            target = Path(self.at(path))
            target.unlink(missing_ok=True)
            folders.add(target.parent)
        for folder in folders:
            _sync_folder(folder)

    def names(self, path: str = "") -> Iterator[str]:
        """One after the other: there may be tens of thousands."""
        try:
            entries = os.scandir(self.at(path))
        except FileNotFoundError:
            return
        with entries:
            yield from (entry.name for entry in entries if entry.is_file())

    def _write_temporary(self, path: str, data: bytes) -> Path:
        held = Path(self.at(temporary(path)))
        with held.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return held


def _sync_folder(folder: Path) -> None:
    """Make sure of the names in a folder; they are written apart from the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
