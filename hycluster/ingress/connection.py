"""A connection to the HTTP ingress: how many there are, and how long and how much one may keep the ingress process
waiting.

uvicorn leaves open, without end: a connection that says nothing or never ends its headers, headers of any size, and a
client that does not read its answer. Here each has its bound.

Pinned to uvicorn 0.54: a subclass of its httptools protocol, of which it overrides the parser's callbacks, and reads
``connections``, ``cycle``, ``flow`` and ``transport``; ``tests/ingress/test_connection.py`` runs it.
"""

from __future__ import annotations

import asyncio
import json
import resource
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hycluster.errors import InvalidInput, Overloaded
from hycluster.ingress.errors import error_body
from hycluster.settings.ingress import Http

MAX_HEADERS = 100
# Of the request line and all headers together.
MAX_HEADER_BYTES = 64 << 10


def protocol(settings: Http) -> type[HttpToolsProtocol]:
    """The protocol of an ingress process's connections, as ``uvicorn.Config(http=...)`` takes it."""
    # An ingress process without a file descriptor to spare can't even say so; half of them are for the rest of the
    # process.
    most = min(settings.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    class IngressConnection(Connection):
        max_connections = most
        stall_s = settings.stalled_client_timeout_s

    return IngressConnection


class Connection(HttpToolsProtocol):
    """One client's connection, and its requests one after the other."""

    max_connections: int
    stall_s: float

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._refused = False
        self._in_head = True
        self._head_bytes = 0
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            message = f"the ingress process has {self.max_connections} connections open already"
            self._refuse(Overloaded.http_status, message, Overloaded.openai_type, "retry-after: 1\r\n")
        else:
            self._give(self._no_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    # -- a client that sends ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            # Before the parser: it keeps whatever it is given until a header ends.
            self._head_bytes += len(data)
            if self._stall is None:
                self._give(self._no_request)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES:
            self._refuse_head()

    def on_message_begin(self) -> None:
        # Pipelined requests come in one piece, whose size says nothing of this one.
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop_waiting()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            self._refuse_head()
        elif not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()
            self._in_head = True

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg, InvalidInput.openai_type)

    def _no_request(self) -> None:
        if self._head_bytes:
            message = f"headers: no end of them came within {self.stall_s:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message, InvalidInput.openai_type)
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        message = f"headers: more than {MAX_HEADERS}, or more than {MAX_HEADER_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, InvalidInput.openai_type)

    def _refuse(self, status: int, message: str, kind: str, headers: str = "") -> None:
        self._refused = True
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            body = json.dumps(error_body(int(status), message, kind))
            head = f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(
                f"{head}{headers}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
            )
            self.transport.close()
        else:
            # In the middle of another answer there is no place for this one.
            self.transport.abort()

    # -- a client that reads ------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Called when what waits to be read is over the transport's mark."""
        super().pause_writing()
        self._give(self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Called when nothing came behind a whole answer; closing waits until that has been read."""
        super().timeout_keep_alive_handler()
        self._give(self.transport.abort)

    def shutdown(self) -> None:
        """Called when the ingress process closes, which must not wait for one who does not read either."""
        super().shutdown()
        if self.transport.is_closing():
            self._give(self.transport.abort)

    # -- patience -----------------------------------------------------------------------------------

    def _give(self, end: Any) -> None:
        """The client has ``stall_s`` from now on to go on; then ``end`` is called."""
        self._stop_waiting()
        self._stall = self.loop.call_later(self.stall_s, end)

    def _stop_waiting(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
