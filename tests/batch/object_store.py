"""moto's S3 over real HTTP on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.fs as pafs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "corpus"


class ObjectStore:
    """A WSGI application with moto behind it.

    moto looks and then writes, and lets other threads in between; a real store does both in one step, and so
    does this one.
    """

    def __init__(self) -> None:
        self.address = ""
        self.conditional_writes = 0
        # False: like the stores that take the header for decoration.
        self.honours_conditions = True
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ:
            return list(self._app(environ, start_response))
        if not self.honours_conditions:
            del environ["HTTP_IF_NONE_MATCH"]
        with self._one_at_a_time:
            self.conditional_writes += 1
            return list(self._app(environ, start_response))

    def uri(self, path: str) -> str:
        return f"s3://key:secret@{BUCKET}/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A running store with one empty bucket."""
    store = ObjectStore()
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    store.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        filesystem, _ = pafs.FileSystem.from_uri(f"{store.uri('')}&allow_bucket_creation=true")
        filesystem.create_dir(BUCKET)
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
