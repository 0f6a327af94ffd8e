"""Which files an input is: one file, a folder or a glob."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

import pyarrow.fs as pafs

from hycluster.errors import SettingsError
from hycluster.storage import one_line, shown


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an input, in order.

    Attributes:
        root: folder that all paths are relative to.
        pattern: what was looked for below it, a glob a folder.
        sizes: bytes by path, as the folder has them.
    """

    root: str
    pattern: tuple[str, ...]
    sizes: dict[str, int]


def list_files(filesystem: pafs.FileSystem, inner: str, path: str) -> Listing:
    """Look the input up.

    Args:
        inner: where it is in the filesystem.
        path: what the user wrote, for errors.

    Raises:
        SettingsError: nothing is there, or it can't be listed.
    """
    try:
        return _list(filesystem, inner, path)
    except OSError as error:
        raise SettingsError(f"input.path: {shown(path)!r} can't be read: {one_line(error)}") from None


def _list(filesystem: pafs.FileSystem, inner: str, path: str) -> Listing:
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.File:
        root, _, name = inner.rpartition("/")
        return Listing(root, (name,), {name: info.size})
    pattern: tuple[str, ...]
    if info.type == pafs.FileType.Directory:
        root, pattern = inner, ("**", "*.parquet")
    elif re.search(r"[*?\[]", inner):
        fixed = re.split(r"[*?\[]", inner, maxsplit=1)[0]
        root = fixed.rpartition("/")[0]
        pattern = tuple(inner[len(root) + 1 :].split("/"))
        if filesystem.get_file_info(root).type != pafs.FileType.Directory:
            raise SettingsError(f"input.path: {shown(path)!r}: there is no folder {root!r}")
    else:
        raise SettingsError(f"input.path: {shown(path)!r}: no such file or folder")
    found = (
        (info.path[len(root) + 1 :], info.size)
        for info in filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        if info.type == pafs.FileType.File
    )
    sizes = dict(sorted((path, size) for path, size in found if wanted(path, pattern)))
    if not sizes:
        what = "no *.parquet file in this folder" if root == inner else "no file matches"
        raise SettingsError(f"input.path: {shown(path)!r}: {what}")
    return Listing(root, pattern, sizes)


def wanted(path: str, pattern: tuple[str, ...]) -> bool:
    """Whether a path below the root matches and no part of it is hidden."""
    parts = tuple(path.split("/"))
    return _matches(parts, pattern) and not any(part[0] in "._" for part in parts)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """A glob, folder by folder: ``*`` stays within one, ``**`` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
