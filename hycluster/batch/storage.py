"""Paths and URIs as pyarrow filesystems, and the one write that must not happen twice.

Local disk: ``create_if_absent`` is atomic (a hard link to a finished temporary file).
Object stores: a PUT is visible whole or not at all, but "only if absent" is a look followed by a
PUT here, so two writers at the same instant could both believe they were first. That takes the
store's conditional PUT (``If-None-Match: *``), which pyarrow does not offer.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from hycluster.errors import SettingsError


def locate(path: str, field: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path inside it, of a local path or a URI (``s3://``, ``file://``, ...).

    Raises:
        SettingsError: names the field when the URI has no filesystem.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        filesystem, inner = pafs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise SettingsError(f"{field}: {path!r} can't be used: {one_line(error)}") from None
    return filesystem, inner.rstrip("/")


def one_line(error: BaseException) -> str:
    """An error's message on one line, its type where it has none."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def write(filesystem: pafs.FileSystem, path: str, data: bytes | memoryview | Any) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def create_if_absent(filesystem: pafs.FileSystem, path: str, data: bytes) -> bool:
    """Write a small file unless there is one. True if this call wrote it."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        if exists(filesystem, path):
            return False
        write(filesystem, path, data)
        return True
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def read_json(filesystem: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        with filesystem.open_input_stream(path) as stream:
            data: dict[str, Any] = json.loads(stream.read())
    except FileNotFoundError:
        return None
    return data
