"""From a path or a URI to its folder: the one place that tells file systems apart."""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs

from hycluster.errors import SettingsError
from hycluster.storage.bucket import BucketFolder
from hycluster.storage.disk import DiskFolder
from hycluster.storage.folder import Folder
from hycluster.storage.masking import masked, masked_line

KINDS: dict[str, type[Folder]] = {"local": DiskFolder, "s3": BucketFolder}


def locate(path: str, field: str) -> Folder:
    """The folder, or the file, of a local path or a URI (``s3://``, ``file://``, ...). Nothing is looked up.

    Raises:
        SettingsError: names the field when the URI has no file system.
    """
    if "://" not in path:
        return DiskFolder(pafs.LocalFileSystem(), str(Path(path).expanduser().absolute()), path)
    try:
        # A URI holds neither spaces nor letters of other alphabets as they are, and people write them.
        filesystem, root = pafs.FileSystem.from_uri(quote(path, safe=string.punctuation))
    except Exception as error:
        # Of whatever kind: some file systems are libraries of their own, which ask their hub first.
        raise SettingsError(f"{field}: {masked(path)!r} can't be used: {masked_line(error)}") from None
    if "//" in root.rstrip("/"):
        raise SettingsError(f"{field}: {masked(path)!r} has an empty name between two slashes; must have none")
    return KINDS.get(filesystem.type_name, Folder)(filesystem, root.rstrip("/"), masked(path))
