"""A folder in a bucket of S3, or of a store that speaks its protocol. A store's answer says that it is safe.

Two libraries, by what each can do. pyarrow reads and lists, as it must for Parquet: so whoever may read an output may
look at it with the same keys, those of a profile in ``~/.aws`` among them. obstore
(https://developmentseed.org/obstore) does what pyarrow does not: a conditional PUT (``If-None-Match: *``,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html), a deletion that leaves no marker, one
request for the bytes of one moment, and one for a part, for which pyarrow takes three. It is set up with the options
of the pyarrow file system: URI query (``endpoint_override``, ``scheme``, ``region``), keys in the URI or the ``AWS_*``
variables, and the instance's or container's role. It knows no profiles: who writes puts such keys into the variables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import obstore
import pyarrow.fs as pafs
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import S3Store

from hycluster.errors import SettingsError
from hycluster.storage.folder import WritableFolder, temporary

# pyarrow's options of a file system, by obstore's.
_OPTIONS = {
    "access_key_id": "access_key",
    "secret_access_key": "secret_key",
    "session_token": "session_token",
    "skip_signature": "anonymous",
    "region": "region",
}


class BucketFolder(WritableFolder):
    """Written through obstore, read through pyarrow."""

    def open_file(self, path: str) -> pafs.NativeFile:
        if "//" in f"/{path}":
            # pyarrow lists such keys and opens none.
            raise FileNotFoundError(f"{path}: its key has an empty name between two slashes; rename it")
        return super().open_file(path)

    def create(self, path: str, data: bytes) -> bool:
        with _os_errors():
            try:
                obstore.put(self._store, self._key(path), data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def check_creates_once(self, path: str) -> None:
        probe = temporary(path)
        try:
            self.create(probe, b"1")
            if self.create(probe, b"2"):
                raise SettingsError(
                    f"output.path: bucket {self._bucket!r} is in a store that ignores 'If-None-Match: *' on a "
                    "write; must be one that honours it (Amazon S3, MinIO, Cloudflare R2, ...) or a local path"
                )
        finally:
            self.delete([probe])

    @contextmanager
    def writing(self, path: str) -> Iterator[Any]:
        with self.filesystem.open_output_stream(self.at(path)) as stream:
            yield stream

    def write(self, path: str, data: bytes | memoryview) -> None:
        with _os_errors():
            obstore.put(self._store, self._key(path), data)

    def replace(self, path: str, data: bytes) -> None:
        # pyarrow's: it takes the keys of a profile, with which 'batch report' may be called.
        with self.writing(path) as stream:
            stream.write(data)

    def read_whole(self, path: str) -> bytes | None:
        """pyarrow would ask for the size first and for the bytes then; they may be a part of a newer object."""
        with _os_errors():
            try:
                return bytes(obstore.get(self._store, self._key(path)).bytes())
            except (FileNotFoundError, NotFoundError):
                return None

    def make(self, path: str = "") -> None:
        """There are no folders."""

    def delete(self, paths: Iterable[str]) -> None:
        # pyarrow would leave an empty object in the place of the folder.
        for path in paths:
            with _os_errors(), suppress(FileNotFoundError, NotFoundError):
                obstore.delete(self._store, self._key(path))

    @property
    def _bucket(self) -> str:
        return self.root.partition("/")[0]

    def _key(self, path: str) -> str:
        return self.at(path).partition("/")[2]

    def object_store(self) -> tuple[str, dict[str, str]]:
        config = {name: str(value).lower() if value is True else str(value) for name, value in self._config.items()}
        return f"s3://{self.root}", {**{f"aws_{name}": value for name, value in config.items()}, "allow_http": "true"}

    @property
    def _store(self) -> S3Store:
        return _open(self._bucket, tuple(self._config.items()))

    @property
    def _config(self) -> dict[str, Any]:
        # Pickling is the one way in which pyarrow tells all options of a file system.
        _, (given,) = self.filesystem.__reduce__()
        config = {ours: given[theirs] for ours, theirs in _OPTIONS.items() if given[theirs]}
        if given["endpoint_override"]:
            endpoint = given["endpoint_override"]
            # That of AWS_ENDPOINT_URL comes with its scheme.
            config["endpoint"] = endpoint if "://" in endpoint else f"{given['scheme']}://{endpoint}"
        return config


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        # Below its message obstore prints the whole error once more.
        raise OSError(str(error).partition("Debug source")[0].strip()) from None


@lru_cache(maxsize=16)
def _open(bucket: str, config: tuple[tuple[str, Any], ...]) -> S3Store:
    # Plain HTTP is asked for by the URI or by AWS_ENDPOINT_URL, as with pyarrow.
    return S3Store(bucket, config=dict(config), client_options={"allow_http": True})  # type: ignore[arg-type]
