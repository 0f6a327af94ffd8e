"""Which files an input is: one file, a folder or a glob."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import unquote

import pyarrow.fs as pafs

from hycluster.errors import SettingsError
from hycluster.storage import Folder, masked_line

EVERYTHING = ("**", "*.parquet")
# What tells a table from a folder of files, by whose it is.
TABLES = {
    "Delta Lake": re.compile(r"/_delta_log/"),
    "Apache Hudi": re.compile(r"/\.hoodie/"),
    "Apache Iceberg": re.compile(r"/metadata/(v\d+|\d+-[0-9a-f-]{36})(\.gz)?\.metadata\.json$"),
}
# Hive's name for the partition of rows that have no value.
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of an input, in order.

    Attributes:
        folder: that all paths are relative to.
        pattern: what was looked for below it, a glob a folder.
        sizes: bytes by path, as the folder has them.
        left_out: what was found and is no part of the input, and why, a line each.
    """

    folder: Folder
    pattern: tuple[str, ...]
    sizes: dict[str, int]
    left_out: tuple[str, ...] = ()


def list_files(place: Folder) -> Listing:
    """Look the input up.

    Args:
        place: a file, a folder or a glob.

    Raises:
        SettingsError: nothing is there, or it can't be listed.
    """
    try:
        return _list(place)
    except SettingsError:
        raise
    except Exception as error:
        # Of whatever kind: a path that is not UTF-8, a hub that can't be reached.
        raise SettingsError(f"input.path: {place.masked!r} can't be read: {masked_line(error)}") from None


def _list(place: Folder) -> Listing:
    info = place.info()
    if info.type == pafs.FileType.File:
        root, _, name = place.root.rpartition("/")
        return Listing(replace(place, root=root), (name,), {name: info.size})
    pattern: tuple[str, ...]
    if info.type == pafs.FileType.Directory:
        folder, pattern = place, EVERYTHING
    elif re.search(r"[*?\[]", place.root):
        fixed = re.split(r"[*?\[]", place.root, maxsplit=1)[0]
        folder = replace(place, root=fixed.rpartition("/")[0])
        pattern = tuple(place.root[len(folder.root) + 1 :].split("/"))
        if folder.info().type != pafs.FileType.Directory:
            raise SettingsError(f"input.path: {place.masked!r}: there is no folder {folder.root!r}")
    else:
        raise SettingsError(f"input.path: {place.masked!r}: no such file or folder")
    found = sorted(
        (info.path[len(folder.root) + 1 :], info.size)
        for info in folder.entries(recursive=True)
        if info.type == pafs.FileType.File
    )
    if folder is place:
        _refuse_tables(place, [path for path, _ in found])
    sizes = {path: size for path, size in found if wanted(path, pattern)}
    left_out = tuple(_left_out([path for path, _ in found if path not in sizes], pattern))
    if not sizes:
        what = "no *.parquet file in this folder" if folder is place else "no file matches"
        raise SettingsError("; ".join([f"input.path: {place.masked!r}: {what}", *left_out]))
    return Listing(folder, pattern, sizes, left_out)


def _left_out(paths: list[str], pattern: tuple[str, ...]) -> Iterator[str]:
    hidden = [path for path in paths if _is_hidden(path) and _is_like_parquet(path)]
    if hidden:
        yield f"{_files(hidden)}: names and folders that begin with '.' or '_' are passed by"
    # Of a glob the rest was not asked for.
    others = [path for path in paths if not _is_hidden(path)] if pattern == EVERYTHING else []
    if others:
        yield f"{_files(others)}: not named *.parquet; a glob such as '**/*' takes them too"


def _files(paths: list[str]) -> str:
    return f"1 file, {paths[0]!r}" if len(paths) == 1 else f"{len(paths)} files, such as {paths[0]!r}"


def _is_like_parquet(path: str) -> bool:
    return path.lower().endswith((".parquet", ".parq", ".pq"))


def _refuse_tables(place: Folder, paths: list[str]) -> None:
    """A table's folder holds rows that the table has deleted or replaced: only its log tells which count.

    Raises:
        SettingsError: names the kind of table.
    """
    for path in paths:
        for kind, log in TABLES.items():
            match = log.search(f"/{path}")
            if match:
                where = f"/{path}"[: match.start()].strip("/") or "."
                raise SettingsError(
                    f"input.path: {place.masked!r}: {where!r} in it is a table of {kind}, whose files hold rows that it"
                    " has deleted; give a plain copy of one of its versions, or a glob such as '*.parquet' if every row"
                    " of every file is meant"
                )


def wanted(path: str, pattern: tuple[str, ...]) -> bool:
    """Whether a path below the root matches and no part of it is hidden."""
    return _matches(tuple(path.split("/")), pattern) and not _is_hidden(path)


def partitions(path: str) -> tuple[tuple[str, str | None], ...]:
    """The columns that a path tells, as Hive writes them: ``country=de/year=2024/x.parquet``."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1]]
    named = {unquote(name): unquote(value) for name, equals, value in pairs if equals and name}
    return tuple((name, None if value == NO_VALUE else value) for name, value in named.items())


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """A glob, folder by folder: ``*`` stays within one, ``**`` is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
