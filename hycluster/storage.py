"""Paths and URIs as pyarrow filesystems, and the one write that must not happen twice.

``create_if_absent`` is atomic. Local disk: a hard link to a finished temporary file. S3 and stores
that speak its protocol: a conditional PUT (``If-None-Match: *``,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html). pyarrow does not
offer that, so it goes through obstore (https://developmentseed.org/obstore), set up with the
options of the pyarrow filesystem: URI query (``endpoint_override``, ``scheme``, ``region``), keys
in the URI or the ``AWS_*`` variables, and the instance's or container's role. Profiles in
``~/.aws`` are known to pyarrow only: such keys have to be put into the variables.

What was written is still there after a power cut. Local disk: a file and the folder that names it
are flushed (``fsync``) before a write returns, so whatever is written after it, it is there too. A
store's answer says as much.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from hycluster.errors import SettingsError

if TYPE_CHECKING:
    from obstore.store import S3Store

# The keys in a URI, also where they hold a slash that should have been escaped.
_KEYS = re.compile(r"://(?:[^/?#@:\s]+:(?:[^/?#\s]*@|\S*@)|[^/?#@\s]*@)")
# What a write that was cut off may leave on a local disk, see _temporary.
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{32}")


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
        raise SettingsError(f"{field}: {shown(path)!r} can't be used: {one_line(error)}") from None
    return filesystem, inner.rstrip("/")


def shown(text: str) -> str:
    """A path, or a text with paths in it, as it may be printed: without the keys of ``s3://KEY:SECRET@bucket``."""
    return _KEYS.sub("://***@", text)


def one_line(error: BaseException) -> str:
    """An error's message on one line, its type where it has none; keys in it are masked."""
    return shown(" ".join(str(error).split())[:500]) or type(error).__name__


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


@contextmanager
def writing(filesystem: pafs.FileSystem, path: str) -> Iterator[Any]:
    """A binary stream into a new file, which is safe on the disk when the block ends."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        with open(path, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _sync_folder(Path(path).parent)
    else:
        with filesystem.open_output_stream(path) as stream:
            yield stream


def write(filesystem: pafs.FileSystem, path: str, data: bytes | memoryview | Any) -> None:
    with writing(filesystem, path) as stream:
        stream.write(data)


def replace(filesystem: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a small file anew; a reader sees the old one or the new one, never a part."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        temporary = _write_temporary(path, data)
        temporary.replace(path)
        _sync_folder(temporary.parent)
    else:
        write(filesystem, path, data)


def make_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Make a folder and those above it. Object stores have none; there it would leave a marker object."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return
    folder = Path(path)
    new = [made for made in (folder, *folder.parents) if not made.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync_folder(made.parent)


def create_if_absent(filesystem: pafs.FileSystem, path: str, data: bytes) -> bool:
    """Write a small file unless there is one: of many at once, one does.

    Returns:
        True if this call wrote it. After an answer that was lost on the way, an object store may say
        False to the one who did; who must know compares what is there.

    Raises:
        OSError: it can't be written.
        SettingsError: the filesystem is neither local nor S3.
    """
    check_exclusive(filesystem, path)
    if isinstance(filesystem, pafs.S3FileSystem):
        from obstore import put
        from obstore.exceptions import AlreadyExistsError, BaseError

        store, key = _object(filesystem, path)
        try:
            put(store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except (BaseError, FileNotFoundError) as error:
            raise _as_os_error(error) from None
        return True
    # The name is given to a file that is whole and on the disk: no power cut leaves a torn one under it.
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
        _sync_folder(temporary.parent)
    return True


def check_exclusive(filesystem: pafs.FileSystem, path: str) -> None:
    """Refuse a filesystem without ``create_if_absent``.

    Raises:
        SettingsError: says which have it.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem | pafs.S3FileSystem):
        raise SettingsError(
            f"output.path: {shown(path)!r} is on {filesystem.type_name!r}, which can't create a file only if it is "
            "absent; must be a local path or an s3:// URI"
        )


def check_creates_once(filesystem: pafs.FileSystem, path: str) -> None:
    """Try whether ``create_if_absent`` keeps its word here: there are S3-like stores that ignore the condition.

    Args:
        path: a file's, which need not exist and is not touched; what is written beside it is deleted again.

    Raises:
        OSError: it can't be written.
        SettingsError: it was created twice.
    """
    if not isinstance(filesystem, pafs.S3FileSystem):
        return
    probe = str(_temporary(path))
    try:
        create_if_absent(filesystem, probe, b"1")
        if create_if_absent(filesystem, probe, b"2"):
            raise SettingsError(
                f"output.path: bucket {path.partition('/')[0]!r} is in a store that ignores 'If-None-Match: *' on a "
                "write; must be one that honours it (Amazon S3, MinIO, Cloudflare R2, ...) or a local path"
            )
    finally:
        delete(filesystem, [probe])


def delete(filesystem: pafs.FileSystem, paths: Iterable[str]) -> None:
    """Delete files, one after the other; one that is not there is fine. When it returns they stay deleted."""
    folders: set[Path] = set()
    for path in paths:
        if isinstance(filesystem, pafs.S3FileSystem):
            # pyarrow would leave an empty object in the place of the folder.
            from obstore import delete as delete_object
            from obstore.exceptions import BaseError, NotFoundError

            store, key = _object(filesystem, path)
            try:
                delete_object(store, key)
            except NotFoundError:
                continue
            except BaseError as error:
                raise _as_os_error(error) from None
        else:
            Path(path).unlink(missing_ok=True)
            folders.add(Path(path).parent)
    for folder in folders:
        _sync_folder(folder)


def names(filesystem: pafs.FileSystem, folder: str) -> Iterator[str]:
    """Names of the files in a folder, in no order; none if there is no such folder.

    On a local disk one after the other: there may be tens of thousands.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            return
        with entries:
            yield from (entry.name for entry in entries if entry.is_file())
        return
    found = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    yield from (info.base_name for info in found if info.type == pafs.FileType.File)


def leftover_of(name: str) -> str | None:
    """The file that was to be written, if the name is that of a write that was cut off."""
    match = _LEFTOVER.fullmatch(name)
    return match["target"] if match else None


def read_json(filesystem: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        with filesystem.open_input_stream(path) as stream:
            data: dict[str, Any] = json.loads(stream.read())
    except FileNotFoundError:
        return None
    return data


def read_whole(filesystem: pafs.FileSystem, path: str) -> bytes | None:
    """A small file as it was at one moment, or None if there is none.

    For files that are replaced while they are read: pyarrow asks an object store for the size first and for the
    bytes then, and what comes may be a part of a newer object.
    """
    if isinstance(filesystem, pafs.S3FileSystem):
        from obstore import get
        from obstore.exceptions import BaseError, NotFoundError

        store, key = _object(filesystem, path)
        try:
            return bytes(get(store, key).bytes())
        except (FileNotFoundError, NotFoundError):
            return None
        except BaseError as error:
            raise _as_os_error(error) from None
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def _temporary(path: str) -> Path:
    target = Path(path)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def _write_temporary(path: str, data: bytes) -> Path:
    temporary = _temporary(path)
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def _sync_folder(folder: Path) -> None:
    """Make sure of the names in a folder; they are written apart from the files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_os_error(error: Exception) -> OSError:
    # Below its message obstore prints the whole error once more.
    return OSError(str(error).partition("Debug source")[0].strip())


def _object(filesystem: pafs.S3FileSystem, path: str) -> tuple[S3Store, str]:
    """The bucket as obstore's, and the key in it."""
    bucket, _, key = path.partition("/")
    # Pickling is the one way in which pyarrow tells all options of a filesystem.
    _, (options,) = filesystem.__reduce__()
    wanted = ("access_key", "secret_key", "session_token", "anonymous", "region", "scheme", "endpoint_override")
    return _bucket(bucket, tuple((name, options[name]) for name in wanted if options[name])), key


@lru_cache(maxsize=16)
def _bucket(bucket: str, options: tuple[tuple[str, Any], ...]) -> S3Store:
    from obstore.store import S3Store

    given = dict(options)
    config: dict[str, Any] = {
        ours: given[theirs]
        for ours, theirs in (
            ("access_key_id", "access_key"),
            ("secret_access_key", "secret_key"),
            ("session_token", "session_token"),
            ("skip_signature", "anonymous"),
            ("region", "region"),
        )
        if theirs in given
    }
    if "endpoint_override" in given:
        endpoint = given["endpoint_override"]
        # That of AWS_ENDPOINT_URL comes with its scheme.
        config["endpoint"] = endpoint if "://" in endpoint else f"{given['scheme']}://{endpoint}"
    # Plain HTTP is asked for by the URI or by AWS_ENDPOINT_URL, as with pyarrow.
    return S3Store(bucket, config=config, client_options={"allow_http": True})  # type: ignore[arg-type]
