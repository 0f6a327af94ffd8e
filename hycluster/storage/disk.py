"""A folder on a disk. A file and the folder that names it are flushed (``fsync``) before a write returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import pyarrow.fs as pafs

from hycluster.storage.folder import WritableFolder, temporary


class DiskFolder(WritableFolder):
    """Written with the operating system's own calls: no library flushes what it writes and the name of it."""

    def entries(self, path: str = "", *, recursive: bool = False) -> list[pafs.FileInfo]:
        """pyarrow knows no name that is not UTF-8, and goes round in circles of links.

        Here such a name is shown, as ``caf\\xe9``, and can't be opened; and no folder is entered from within itself.
        """
        try:
            top = os.stat(self.at(path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return list(_walk(os.fsencode(self.at(path)), self.at(path), recursive, [(top.st_dev, top.st_ino)]))

    def open_file(self, path: str) -> pafs.NativeFile:
        try:
            return super().open_file(path)
        except FileNotFoundError:
            if "\\x" in path:
                raise FileNotFoundError(f"{path}: its name is not UTF-8; rename it") from None
            raise

    def real(self, path: str = "") -> str:
        return os.path.realpath(self.at(path))

    def object_store(self) -> tuple[str, dict[str, str]]:
        return self.root, {}

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
        """A hard link is not made over a file. Whether any can be made is looked at, and nothing is left behind."""
        folder = Path(self.at(path)).parent
        there = next(made for made in (folder, *folder.parents) if made.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number), str(there))

    @contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        target = Path(self.at(path))
        with _whole_or_gone(target), target.open("wb") as stream:
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
        with _whole_or_gone(held), held.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return held


@contextmanager
def _whole_or_gone(path: Path) -> Iterator[None]:
    """What could not be written to its end is deleted, and the error says which file it was: the disk may be full."""
    try:
        yield
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _walk(folder: bytes, shown: str, recursive: bool, within: list[tuple[int, int]]) -> Iterator[pafs.FileInfo]:
    """What is in a folder.

    Args:
        shown: its path as it may be shown.
        within: the folders that the way here has led through, by device and number.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{shown}/{entry.name.decode(errors='backslashreplace')}"
            try:
                stat = entry.stat()
            except OSError:
                # A link to nothing, or to itself; or it is gone.
                continue
            if S_ISREG(stat.st_mode):
                yield pafs.FileInfo(path, pafs.FileType.File, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
            elif S_ISDIR(stat.st_mode):
                yield pafs.FileInfo(path, pafs.FileType.Directory)
                here = (stat.st_dev, stat.st_ino)
                if recursive and here not in within:
                    yield from _walk(entry.path, path, recursive, [*within, here])


def _sync_folder(folder: Path) -> None:
    """Make sure of the names in a folder; they are written apart from the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
