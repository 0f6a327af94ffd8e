"""An S3-compatible store on loopback, in a process of its own.

In the tests' own process its libraries would leave objects behind that vLLM's search for its kernels trips over.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pyarrow.fs as pafs

BUCKET = "corpus"


class ObjectStore:
    """A running store."""

    def __init__(self, address: str) -> None:
        self.address = address

    @property
    def conditional_writes(self) -> int:
        return int(self._control("writes"))

    @property
    def requests(self) -> int:
        """All of them so far."""
        return int(self._control("requests"))

    @property
    def honours_conditions(self) -> bool:
        """False: like the stores that take the header for decoration."""
        return True

    @honours_conditions.setter
    def honours_conditions(self, honours: bool) -> None:
        self._control(f"honour/{int(honours)}")

    def _control(self, path: str) -> str:
        return httpx.get(f"http://{self.address}/-/{path}").raise_for_status().text

    def uri(self, path: str) -> str:
        return f"s3://key:secret@{BUCKET}/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A running store with one empty bucket."""
    script = Path(__file__).with_name("object_store_server.py")
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            store = ObjectStore(server.stdout.readline().strip())
            filesystem, _ = pafs.FileSystem.from_uri(f"{store.uri('')}&allow_bucket_creation=true")
            filesystem.create_dir(BUCKET)
            yield store
        finally:
            server.kill()
