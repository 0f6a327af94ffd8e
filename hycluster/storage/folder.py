"""A folder of any file system that pyarrow knows, to be read; and what those that can be written promise.

``create`` is atomic: of many at once, one does it. What a write has returned from is still there after a power cut,
and so is all that was written before it.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Self

import pyarrow.fs as pafs

from hycluster.errors import SettingsError

# What a write that was cut off may leave on a disk, see temporary.
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{32}")


@dataclass(frozen=True)
class Folder:
    """A place in a file system: located once, then handed on. Small and picklable, keys included.

    All methods take paths relative to it, with ``/``; an empty one is the folder itself.

    Attributes:
        filesystem: pyarrow's, to read Parquet from.
        root: where the folder is in it; has no keys.
        masked: what the user wrote, as it may be shown: without the keys of a URI.
    """

    filesystem: pafs.FileSystem
    root: str
    masked: str

    def at(self, path: str) -> str:
        """A path inside the file system."""
        return f"{self.root}/{path}" if path else self.root

    def real(self, path: str = "") -> str:
        """The one path of all that lead to the same place, through links or ``..``."""
        return self.at(path)

    def below(self, path: str) -> Self:
        """A folder, or a file, in this one."""
        base, question, query = self.masked.partition("?") if "://" in self.masked else (self.masked, "", "")
        return replace(self, root=self.at(path), masked=f"{base.rstrip('/')}/{path}{question}{query}")

    def writable(self) -> WritableFolder:
        """This very folder, if files can be created in it only if they are absent.

        Raises:
            SettingsError: says which file systems can.
        """
        raise SettingsError(
            f"output.path: {self.masked!r} is on {self.filesystem.type_name!r}, which can't create a file only if it "
            "is absent; must be a local path or an s3:// URI"
        )

    def object_store(self) -> tuple[str, dict[str, str]]:
        """This folder's URI, and the options with which libraries over Rust's object_store open it.

        Raises:
            SettingsError: they can't.
        """
        kind = self.filesystem.type_name
        raise SettingsError(f"{self.masked!r} is a table on {kind!r}; must be on a local path or an s3:// URI")

    def info(self, path: str = "") -> pafs.FileInfo:
        """What is there: a file, a folder or nothing."""
        return self.filesystem.get_file_info(self.at(path))

    def exists(self, path: str) -> bool:
        return bool(self.info(path).type != pafs.FileType.NotFound)

    def entries(self, path: str = "", *, recursive: bool = False) -> list[pafs.FileInfo]:
        """Files and folders in a folder, in no order; none if there is no such folder."""
        selector = pafs.FileSelector(self.at(path), allow_not_found=True, recursive=recursive)
        found: list[pafs.FileInfo] = self.filesystem.get_file_info(selector)
        return found

    def names(self, path: str = "") -> Iterator[str]:
        """Names of the files in a folder, in no order; none if there is no such folder."""
        yield from (info.base_name for info in self.entries(path) if info.type == pafs.FileType.File)

    def open_stream(self, path: str) -> pafs.NativeFile:
        """A file's bytes, to be read in order and closed."""
        return self.filesystem.open_input_stream(self.at(path))

    def open_file(self, path: str) -> pafs.NativeFile:
        """A file's bytes, to be read in any order and closed."""
        return self.filesystem.open_input_file(self.at(path))

    def read_json(self, path: str) -> dict[str, Any] | None:
        """A JSON object, or None if there is no such file."""
        try:
            with self.open_stream(path) as stream:
                data: dict[str, Any] = json.loads(stream.read())
        except FileNotFoundError:
            return None
        return data


class WritableFolder(Folder, ABC):
    """A folder on a disk or in a bucket. Writing methods raise OSError where it can't be written."""

    def writable(self) -> WritableFolder:
        return self

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a small file unless there is one: of many at once, one does.

        Returns:
            True if this call wrote it. After an answer that was lost on the way, an object store may say
            False to the one who did; who must know compares what is there.
        """

    @abstractmethod
    def check_creates_once(self, path: str) -> None:
        """Try whether ``create`` keeps its word here: there are S3-like stores that ignore the condition.

        Args:
            path: a file's, which need not exist and is not touched; what is written beside it is deleted again.

        Raises:
            OSError: it can't be written.
            SettingsError: it was created twice.
        """

    @abstractmethod
    def writing(self, path: str) -> AbstractContextManager[Any]:
        """A binary stream into a new file, which is safe when the block ends."""

    @abstractmethod
    def write(self, path: str, data: bytes | memoryview) -> None:
        """Write a new file."""

    @abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Write a small file anew; a reader sees the old one or the new one, never a part."""

    @abstractmethod
    def read_whole(self, path: str) -> bytes | None:
        """A small file as it was at one moment, or None if there is none: for files that are replaced meanwhile."""

    @abstractmethod
    def make(self, path: str = "") -> None:
        """Make a folder and those above it. Object stores have none; there it would leave a marker object."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Delete files, one after the other; one that is not there is fine. When it returns they stay deleted."""

    def delete_tree(self, path: str) -> None:
        """Delete a folder with all that is in it.

        Raises:
            FileNotFoundError: there is none.
        """
        self.filesystem.delete_dir(self.at(path))


def temporary(path: str) -> str:
    """Another name beside a file, of which ``leftover_of`` knows that it is one."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{uuid.uuid4().hex}"


def leftover_of(name: str) -> str | None:
    """The file that was to be written, if the name is that of a write that was cut off."""
    match = _LEFTOVER.fullmatch(name)
    return match["target"] if match else None
