"""A connection to the HTTP ingress: how many there are, how long and how much one may keep the ingress process waiting,
and how it ends.

uvicorn leaves open, without end: a connection that says nothing or never ends its headers, headers and trailers of any
size, a body that never ends though it has been answered, and a client that does not read its answer. Here each has its
bound. What comes behind a request waits until that has been answered, whatever it is.

A client that reuses a connection at the moment when it is closed would be reset. Nothing that has arrived is closed
over (:meth:`LingeringTransport.unread`), an answer says how long the connection is kept (``Keep-Alive``) or that it is
the last one (``Connection: close``), and an ingress process that leaves waits a moment for those who ask just then.

Pinned to uvicorn 0.54: a subclass of its httptools protocol, of which it overrides the parser's callbacks, and reads
``connections``, ``cycle``, ``pipeline``, ``flow``, ``headers`` and ``transport``; of a cycle it sets ``keep_alive``,
``disconnected`` and what says how its answer ends. ``tests/ingress/test_connection.py`` runs it.
"""

from __future__ import annotations

import asyncio
import enum
import json
import resource
import ssl
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hycluster.errors import InvalidInput, Overloaded
from hycluster.ingress.errors import error_body
from hycluster.ingress.lingering import LingeringTransport
from hycluster.settings.ingress import Http

MAX_HEADERS = 100
# Of the request line and all headers together; and of what frames a body, trailers with it, between two bytes of it.
MAX_HEADER_BYTES = 64 << 10
# Of a body that comes when its request has been answered already.
MAX_LATE_BYTES = 1 << 20
# What is kept open beyond what clients are told: they count from when they have read the answer.
KEPT_LONGER_S = 1.0
# How long an ingress process that leaves waits for those who ask on a connection that they have.
LEAVING_S = 1.0
# Where there is no room for another connection, one on which nothing has been asked for so long makes some.
GIVES_WAY_AFTER_S = 5.0
_MOMENT_S = 0.05


def protocol(settings: Http, *, keep_alive: bool = True) -> type[HttpToolsProtocol]:
    """The protocol of an ingress process's connections, as ``uvicorn.Config(http=...)`` takes it.

    Args:
        keep_alive: False makes each answer its connection's last.
    """
    # An ingress process without a file descriptor to spare can't even say so; half of them are for the rest of the
    # process.
    most = min(settings.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    class IngressConnection(Connection):
        max_connections = most
        stall_s = settings.stalled_client_timeout_s
        keep_alive_s = settings.keep_alive_timeout_s
        # One who is told that its body is too large may be through with it.
        linger_bytes = settings.max_body_mib << 20
        last_answer = not keep_alive
        idle: dict[Connection, float] = {}  # noqa: RUF012 - of all of this ingress process's

    return IngressConnection


class _Awaited(enum.Enum):
    """What the client is to send next."""

    REQUEST = enum.auto()
    HEADERS = enum.auto()
    # Of a body whose request has been answered.
    REST = enum.auto()


class Connection(HttpToolsProtocol):
    """One client's connection, and its requests one after the other.

    Attributes:
        idle: connections whose last request has been answered, since when, the longest first.
    """

    max_connections: int
    stall_s: float
    keep_alive_s: float
    linger_bytes: int
    last_answer: bool
    idle: dict[Connection, float]
    transport: LingeringTransport  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._refused = False
        self._certificates: list[str] = []
        self._last_words = b""
        self._leaving = False
        self._running: RequestResponseCycle | None = None
        # Of the request that is coming: its headers, or none; within them; else within its body.
        self._in_head, self._begun = True, False
        # That have come since the last byte of a body or the last end of headers.
        self._bytes = 0
        self._late_bytes = 0
        self._awaited: _Awaited | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        # As ASGI's extension for TLS has it.
        encrypted = transport.get_extra_info("ssl_object")
        shown = encrypted.getpeercert(binary_form=True) if encrypted is not None else None
        self._certificates = [] if shown is None else [ssl.DER_cert_to_PEM_cert(shown)]
        lingering: Any = LingeringTransport(transport, self.loop, self.stall_s, self.linger_bytes)
        super().connection_made(lingering)
        if len(self.connections) > self.max_connections and not self._made_room():
            message = f"the ingress process has {self.max_connections} connections open already"
            self._refuse(Overloaded.http_status, message, Overloaded.openai_type, "retry-after: 1\r\n")
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._refused = True
        self._watch()
        self._read_on()
        self.transport.lost()
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells the request that came last.
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called when the ingress process closes: each answer is the last, and who has none to come is not cut off in
        the middle of asking."""
        self._leaving = self.last_answer = True
        if self._running is not None and not self._running.response_started and not self.pipeline:
            self._running.keep_alive = False
        if self._awaited is _Awaited.REQUEST:
            self._give(LEAVING_S, self._no_request)

    def _made_room(self) -> bool:
        longest = next(iter(self.idle), None)
        if longest is None or self.loop.time() - self.idle[longest] < GIVES_WAY_AFTER_S or longest.transport.unread():
            return False
        del self.idle[longest]
        longest.transport.abort()
        return True

    # -- a client that sends ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            self.transport.heard(len(data))
            return
        # Before the parser: it keeps whatever it is given until a header ends.
        self._bytes += len(data)
        super().data_received(data)
        if self._bytes > MAX_HEADER_BYTES and not self._refused:
            self._refuse_head()
        self._watch()

    def on_message_begin(self) -> None:
        if not self._refused:
            self._begun = True
            super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # No trailer is of use to anybody here, nor is it to pass for a header.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        self._bytes = self._late_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        hosts = sum(name == b"host" for name, _ in self.headers)
        version = self.parser.get_http_version()
        if len(self.headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            self._refuse_head()
        elif hosts != 1 and (hosts or version == "1.1"):
            message = f"headers: Host is there {hosts} times; it must be there once"
            self._refuse(HTTPStatus.BAD_REQUEST, message, InvalidInput.openai_type)
        else:
            # Raises for a target that is no URL.
            super().on_headers_complete()
            self._in_head = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # Called when a request's turn has come.
        self._running = cycle
        if self._certificates:
            cycle.scope["extensions"] = {"tls": {"client_cert_chain": self._certificates}}
        if self.last_answer and not self.pipeline:
            cycle.keep_alive = False
        if cycle.keep_alive and self.keep_alive_s >= 1:
            kept = b"timeout=%d" % self.keep_alive_s
            cycle.default_headers = [*cycle.default_headers, (b"keep-alive", kept)]
        if cycle.scope["http_version"] < "1.1":
            app = _until_closed(app, cycle)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._bytes = 0
        if self.cycle.response_complete:
            self._late_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()
            # Pipelined requests come in one piece, whose size says nothing of the next.
            self._bytes = 0
            self._in_head, self._begun = True, False

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg, InvalidInput.openai_type)

    def _no_request(self) -> None:
        if self.transport.unread():
            # It came in time, and this process was busy.
            self._give(_MOMENT_S, self._no_request)
        elif self._awaited is _Awaited.HEADERS:
            message = f"headers: no end of them came within {self.stall_s:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message, InvalidInput.openai_type)
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        what = "headers" if self._in_head else "trailers and chunk extensions"
        message = f"{what}: more than {MAX_HEADERS}, or more than {MAX_HEADER_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, InvalidInput.openai_type)

    def _refuse(self, status: int, message: str, kind: str, headers: str = "") -> None:
        """Answer the request that is coming, and take no other."""
        self._refused = True
        if not self._in_head and self.cycle.response_complete:
            # It has its answer.
            self.transport.close()
            return
        body = json.dumps(error_body(int(status), message, kind))
        head = f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self._last_words = f"{head}{headers}content-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
        running = self._running is not None and not self._running.response_complete
        if not self._in_head and self.pipeline:
            # Its turn has not come.
            self.pipeline.popleft()
        elif not self._in_head and running:
            assert self._running is not None
            self._running.disconnected = True
            self._running.message_event.set()
            if self._running.response_started:
                # In the middle of its answer there is no place for another one.
                self.transport.abort()
            running = False
        if not running:
            self._say_last_words()

    def _say_last_words(self) -> None:
        self.transport.write(self._last_words)
        self.transport.close()

    # -- a client that reads ------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Called when an answer has been written, or handed to the transport."""
        super().on_response_complete()
        # The patience is ours.
        self._unset_keepalive_if_required()
        if self._last_words and self._running is not None and self._running.response_complete:
            self._say_last_words()
        else:
            self._watch()

    def pause_writing(self) -> None:
        """Called when what waits to be read is over the transport's mark."""
        super().pause_writing()
        self._read_on()
        self._unread = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._read_on()
        super().resume_writing()

    def _read_on(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # -- patience -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Whatever is to come now has its time from when it was first waited for."""
        if self._late_bytes > MAX_LATE_BYTES:
            self.transport.close()
        awaited = self._next()
        if awaited is self._awaited:
            return
        self._awaited = awaited
        self.idle.pop(self, None)
        if self._patience is not None:
            self._patience.cancel()
        if awaited is _Awaited.REST:
            self._give(self.stall_s, self.transport.close)
        elif awaited is _Awaited.REQUEST and self._leaving:
            self._give(LEAVING_S, self._no_request)
        elif awaited is _Awaited.REQUEST and self._running is not None:
            self.idle[self] = self.loop.time()
            self._give(self.keep_alive_s + KEPT_LONGER_S, self._no_request)
        elif awaited is not None:
            self._give(self.stall_s, self._no_request)

    def _next(self) -> _Awaited | None:
        if self._refused or self.transport.is_closing():
            return None
        if not self._in_head:
            return _Awaited.REST if self.cycle.response_complete else None
        if self._running is not None and not self._running.response_complete:
            return None
        return _Awaited.HEADERS if self._begun else _Awaited.REQUEST

    def _give(self, seconds: float, end: Any) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(seconds, end)


def _until_closed(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """The app for a client of HTTP/1.0, which knows no chunks: an answer without a length ends with its connection."""
    cycle.waiting_for_100_continue = False

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        unmeasured = False

        async def unchunked(message: Message) -> None:
            nonlocal unmeasured
            if message["type"] == "http.response.start":
                unmeasured = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                # uvicorn's words for "has a length", which then is what comes.
                cycle.chunked_encoding = False if unmeasured else None
            elif unmeasured:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, unchunked)

    return plain
