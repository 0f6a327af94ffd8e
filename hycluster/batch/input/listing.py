"""Which files an input is: one file, a folder or a glob."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow.fs as pafs

from hycluster.batch.input.snapshots import DELTA, ICEBERG, Snapshot, snapshot_of
from hycluster.errors import SettingsError
from hycluster.explain import near_file
from hycluster.storage import Folder, masked_line

EVERYTHING = ("**", "*.parquet")
# What tells a table from a folder of files, by whose it is.
TABLES = {
    DELTA: re.compile(r"/_delta_log/"),
    "Apache Hudi": re.compile(r"/\.hoodie/"),
    ICEBERG: re.compile(r"/metadata/(v\d+|\d+-[0-9a-f-]{36})(\.gz)?\.metadata\.json$"),
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
        snapshot: of the table that the folder is.
    """

    folder: Folder
    pattern: tuple[str, ...]
    sizes: dict[str, int]
    left_out: tuple[str, ...] = ()
    snapshot: Snapshot | None = None

    def partition(self, path: str) -> tuple[tuple[str, str | None], ...]:
        """The columns that a file's rows have beside those of the file."""
        return partitions(path) if self.snapshot is None else self.snapshot.partitions[path]


def list_files(place: Folder, snapshot: int | None = None) -> Listing:
    """Look the input up.

    Args:
        place: a file, a folder or a glob.
        snapshot: of the table that it is; the latest by default.

    Raises:
        SettingsError: nothing is there, or it can't be listed.
    """
    try:
        return _list(place, snapshot)
    except SettingsError:
        raise
    except Exception as error:
        # Of whatever kind: a path that is not UTF-8, a hub that can't be reached.
        raise SettingsError(f"input.path: {place.masked!r} can't be read: {masked_line(error)}") from None


def _list(place: Folder, snapshot: int | None) -> Listing:
    info = place.info()
    if snapshot is not None and info.type != pafs.FileType.Directory:
        raise SettingsError(f"input.snapshot: {snapshot}: {place.masked!r} is no folder, and so no table")
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
        near = near_file(Path(place.root)) if place.filesystem.type_name == "local" else ""
        raise SettingsError(f"input.path: {place.masked!r}: no such file or folder{near}")
    found = sorted(
        (info.path[len(folder.root) + 1 :], info.size)
        for info in folder.entries(recursive=True)
        if info.type == pafs.FileType.File
    )
    table = _table(place, [path for path, _ in found], snapshot) if folder is place else None
    if table is not None:
        return _of_table(place, dict(found), table)
    sizes = {path: size for path, size in found if wanted(path, pattern)}
    left_out = tuple(_left_out(folder, [path for path, _ in found if path not in sizes], pattern))
    if not sizes:
        what = "no *.parquet file in this folder" if folder is place else "no file matches"
        raise SettingsError("; ".join([f"input.path: {place.masked!r}: {what}", *left_out]))
    return Listing(folder, pattern, sizes, left_out)


def _left_out(folder: Folder, paths: list[str], pattern: tuple[str, ...]) -> Iterator[str]:
    hidden = [path for path in paths if _is_hidden(path) and _is_like_parquet(path)]
    if hidden:
        yield f"{_files(hidden)}: names and folders that begin with '.' or '_' are passed by"
    # Of a glob the rest was not asked for.
    others = [path for path in paths if not _is_hidden(path)] if pattern == EVERYTHING else []
    if others:
        ends = {PurePosixPath(path).suffix for path in others}
        glob = folder.below(f"**/*{ends.pop() if len(ends) == 1 else ''}").masked
        yield f"{_files(others)}: not named *.parquet; the glob {glob!r} takes them too"


def _files(paths: list[str]) -> str:
    return f"1 file, {paths[0]!r}" if len(paths) == 1 else f"{len(paths)} files, such as {paths[0]!r}"


def _is_like_parquet(path: str) -> bool:
    return path.lower().endswith((".parquet", ".parq", ".pq"))


def _table(place: Folder, paths: list[str], number: int | None) -> Snapshot | None:
    """The table that a folder is, if it is one: it holds rows that the table has deleted or replaced, too.

    Raises:
        SettingsError: it is one of a kind that can't be read, or there is one in it.
    """
    for path in paths:
        for kind, log in TABLES.items():
            match = log.search(f"/{path}")
            if not match:
                continue
            where = f"/{path}"[: match.start()].strip("/") or "."
            if where == "." and kind in (DELTA, ICEBERG):
                return snapshot_of(kind, place, paths, number)
            raise SettingsError(
                f"input.path: {place.masked!r}: {where!r} in it is a table of {kind}, whose files hold rows that it"
                " has deleted; give "
                + ("its own folder" if kind in (DELTA, ICEBERG) else "a plain copy of one of its versions")
                + ", or a glob such as '*.parquet' if every row of every file is meant"
            )
    if number is not None:
        raise SettingsError(f"input.snapshot: {number}: {place.masked!r} is no table of {DELTA} or {ICEBERG}")
    return None


def _of_table(place: Folder, found: dict[str, int], table: Snapshot) -> Listing:
    sizes = {path: found[path] for path in table.partitions}
    where = f"{place.masked!r}, a table of {table.kind}"
    if not sizes:
        raise SettingsError(f"input.path: {where}: its snapshot {table.number} has no rows")
    others = [path for path in found if path not in sizes and not _is_hidden(path) and _is_like_parquet(path)]
    left_out = (f"{_files(others)}: no part of snapshot {table.number} of {where}",) if others else ()
    return Listing(place, EVERYTHING, sizes, left_out, table)


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
