"""Which files an input is: one file, a folder or a glob."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace

import pyarrow.fs as pafs

from hycluster.errors import SettingsError
from hycluster.storage import Folder, masked_line


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an input, in order.

    Attributes:
        folder: that all paths are relative to.
        pattern: what was looked for below it, a glob a folder.
        sizes: bytes by path, as the folder has them.
    """

    folder: Folder
    pattern: tuple[str, ...]
    sizes: dict[str, int]


def list_files(place: Folder) -> Listing:
    """Look the input up.

    Args:
        place: a file, a folder or a glob.

    Raises:
        SettingsError: nothing is there, or it can't be listed.
    """
    try:
        return _list(place)
    except OSError as error:
        raise SettingsError(f"input.path: {place.masked!r} can't be read: {masked_line(error)}") from None


def _list(place: Folder) -> Listing:
    info = place.info()
    if info.type == pafs.FileType.File:
        root, _, name = place.root.rpartition("/")
        return Listing(replace(place, root=root), (name,), {name: info.size})
    pattern: tuple[str, ...]
    if info.type == pafs.FileType.Directory:
        folder, pattern = place, ("**", "*.parquet")
    elif re.search(r"[*?\[]", place.root):
        fixed = re.split(r"[*?\[]", place.root, maxsplit=1)[0]
        folder = replace(place, root=fixed.rpartition("/")[0])
        pattern = tuple(place.root[len(folder.root) + 1 :].split("/"))
        if folder.info().type != pafs.FileType.Directory:
            raise SettingsError(f"input.path: {place.masked!r}: there is no folder {folder.root!r}")
    else:
        raise SettingsError(f"input.path: {place.masked!r}: no such file or folder")
    found = (
        (info.path[len(folder.root) + 1 :], info.size)
        for info in folder.entries(recursive=True)
        if info.type == pafs.FileType.File
    )
    sizes = dict(sorted((path, size) for path, size in found if wanted(path, pattern)))
    if not sizes:
        what = "no *.parquet file in this folder" if folder is place else "no file matches"
        raise SettingsError(f"input.path: {place.masked!r}: {what}")
    return Listing(folder, pattern, sizes)


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
