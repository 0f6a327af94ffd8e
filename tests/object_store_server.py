"""moto's S3 over real HTTP on loopback; run as a script. Prints its address, serves until its standard input ends.

``GET /-/writes`` tells the number of conditional writes, ``GET /-/requests`` that of all requests;
``GET /-/honour/0`` (``/1``) has conditions ignored (kept).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Application:
    """A WSGI application with moto behind it.

    moto looks and then writes, and lets other threads in between; a real store does both in one step, and so
    does this one.
    """

    def __init__(self) -> None:
        self._requests = 0
        self._conditional_writes = 0
        self._honours_conditions = True
        self._moto: Any = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/-/"):
            if path.startswith("/-/honour/"):
                self._honours_conditions = path.endswith("1")
            start_response("200 OK", [("Content-Type", "text/plain")])
            count = self._requests if path == "/-/requests" else self._conditional_writes
            return [str(count).encode()]
        self._requests += 1
        if "HTTP_IF_NONE_MATCH" not in environ:
            return list(self._moto(environ, start_response))
        if not self._honours_conditions:
            del environ["HTTP_IF_NONE_MATCH"]
        with self._one_at_a_time:
            self._conditional_writes += 1
            return list(self._moto(environ, start_response))


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


def main() -> None:
    server = make_server("127.0.0.1", 0, Application(), threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
