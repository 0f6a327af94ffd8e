"""A path or a URI as the folder that the code under test takes."""

from __future__ import annotations

from pathlib import Path

from hycluster.storage import WritableFolder, locate


def at(path: Path | str) -> WritableFolder:
    return locate(str(path), "test").writable()
