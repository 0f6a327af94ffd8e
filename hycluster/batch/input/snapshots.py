"""Tables of Delta Lake and Apache Iceberg: which files are theirs at a snapshot, as their own libraries tell.

Only files whose every row counts are read. A snapshot that marks rows in its files as deleted, or gives their columns
other names than the files do, is refused: its rows would not be those that the table has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlparse

from hycluster.errors import SettingsError
from hycluster.storage import Folder, masked_line

DELTA = "Delta Lake"
ICEBERG = "Apache Iceberg"
# Per path, the columns that the table keeps beside the file.
Partitions = dict[str, tuple[tuple[str, str | None], ...]]
_METADATA = re.compile(r"metadata/(?:v(\d+)|(\d+)-[0-9a-f-]{36})(?:\.gz)?\.metadata\.json")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A table at one moment.

    Attributes:
        kind: whose format it is.
        number: Delta's version or Iceberg's snapshot id.
        partitions: its files, in order, and what each row of them has beside the file's columns.
    """

    kind: str
    number: int
    partitions: Partitions = field(default_factory=dict)


def snapshot_of(kind: str, place: Folder, paths: Sequence[str], number: int | None) -> Snapshot:
    """A table at a snapshot, its latest by default.

    Args:
        paths: all files in the folder.

    Raises:
        SettingsError: there is no such snapshot, or not all rows of its files are rows of it.
    """
    where = f"input.path: {place.masked!r} is a table of {kind}"
    try:
        snapshot = (_delta if kind == DELTA else _iceberg)(where, place, paths, number)
    except ImportError as error:
        raise SettingsError(
            f"{where}, which needs {error.name!r}: pip install 'hycluster[tables]'; or give a plain copy of one of its"
            " snapshots, or a glob such as '*.parquet' if every row of every file is meant"
        ) from None
    except SettingsError:
        raise
    except Exception as error:
        # Of whatever kind: logs are as strange as files, and each library has errors of its own.
        asked = "" if number is None else f" at input.snapshot {number}"
        raise SettingsError(f"{where} that can't be read{asked}: {masked_line(error)}") from None
    held = set(paths)
    gone = [path for path in snapshot.partitions if path not in held]
    if gone:
        raise SettingsError(
            f"{where}, of whose snapshot {snapshot.number} there is no {gone[0]!r} any more; give a later one"
        )
    return snapshot


def _delta(where: str, place: Folder, paths: Sequence[str], number: int | None) -> Snapshot:
    import pyarrow as pa
    from deltalake import DeltaTable

    uri, options = place.object_store()
    table = DeltaTable(uri, version=number, storage_options=options)
    version: int = table.version()
    if pa.table(table.deletion_vectors()).num_rows:
        raise SettingsError(f"{where} that marks rows of its files as deleted; run REORG TABLE ... APPLY (PURGE) on it")
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise SettingsError(f"{where} whose columns have other names in its files (column mapping); give a plain copy")
    partitions: Partitions = {}
    for action in pa.table(table.get_add_actions()).to_pylist():
        path = unquote(action["path"])
        if path.startswith("/") or "://" in path:
            raise SettingsError(f"{where} with files outside of its folder, such as {path!r}; give a plain copy")
        partitions[path] = tuple((name, _told(value)) for name, value in (action.get("partition") or {}).items())
    return Snapshot(DELTA, version, dict(sorted(partitions.items())))


def _told(value: Any) -> str | None:
    """A partition's value as the log has it."""
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _iceberg(where: str, place: Folder, paths: Sequence[str], number: int | None) -> Snapshot:
    from pyiceberg.catalog.noop import NoopCatalog
    from pyiceberg.io.pyarrow import PyArrowFileIO
    from pyiceberg.serializers import FromInputFile
    from pyiceberg.table import StaticTable

    newest = _newest(where, paths)
    reads = PyArrowFileIO()
    # The file system of the input, keys included, whatever the metadata says of where it lies.
    reads.fs_by_scheme = lambda scheme, netloc: place.filesystem
    uri, _ = place.object_store()
    metadata = FromInputFile.table_metadata(reads.new_input(f"{uri}/{newest}"))
    snapshot = metadata.current_snapshot() if number is None else metadata.snapshot_by_id(number)
    if snapshot is None and number is not None:
        raise SettingsError(f"input.snapshot: {number}: {place.masked!r} has none of that id; {_ids(metadata)}")
    if snapshot is None:
        return Snapshot(ICEBERG, 0)
    renamed = _renamed(metadata)
    if renamed:
        raise SettingsError(f"{where} whose column {renamed!r} has had another name or meaning; give a plain copy")
    table = StaticTable(("input", newest), metadata, newest, reads, NoopCatalog("input"))
    found: Partitions = {}
    for task in table.scan(snapshot_id=snapshot.snapshot_id).plan_files():
        if task.delete_files:
            raise SettingsError(f"{where} that marks rows of its files as deleted; rewrite its data files first")
        if str(task.file.file_format.value).upper() != "PARQUET":
            raise SettingsError(f"{where} with files of {task.file.file_format.value}; must be Parquet")
        # The files hold the columns that they are partitioned by.
        found[_below(where, place, task.file.file_path)] = ()
    return Snapshot(ICEBERG, snapshot.snapshot_id, dict(sorted(found.items())))


def _newest(where: str, paths: Sequence[str]) -> str:
    """The newest metadata of a table that no catalog is asked about."""
    numbered = [(int(found[1] or found[2]), path) for path in paths if (found := _METADATA.fullmatch(path))]
    newest = [path for number, path in numbered if number == max(numbered)[0]]
    if len(newest) > 1:
        # One of two writers has lost, and only the catalog knows which.
        raise SettingsError(f"{where} with two newest metadata files: {newest[0]}, {newest[1]}; delete one")
    return newest[0]


def _ids(metadata: Any) -> str:
    ids = [str(snapshot.snapshot_id) for snapshot in metadata.snapshots]
    return f"it has {', '.join(ids[-5:])}" if ids else "it has none at all"


def _renamed(metadata: Any) -> str | None:
    """A column that some schema of the table has under another name, or whose name another column has had."""
    by_id: dict[int, str] = {}
    by_name: dict[str, int] = {}
    for number, name in _columns(metadata):
        if by_id.setdefault(number, name) != name or by_name.setdefault(name, number) != number:
            return name
    return None


def _columns(metadata: Any) -> Iterator[tuple[int, str]]:
    for schema in metadata.schemas:
        for number in schema.field_ids:
            yield number, schema.find_column_name(number)


def _below(where: str, place: Folder, location: str) -> str:
    """A data file's path relative to the folder."""
    uri = urlparse(location)
    path = f"{uri.netloc}{uri.path}" if "://" in location else location.removeprefix("file:")
    for root in (place.root, place.real()):
        if path.startswith(f"{root}/"):
            return path.removeprefix(f"{root}/")
    raise SettingsError(f"{where} with files outside of its folder, such as {location!r}; give a plain copy")
