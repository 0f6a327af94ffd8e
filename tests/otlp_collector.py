"""A collector of the tests' own: an OTLP receiver by HTTP or by gRPC, which keeps what it is sent."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.waiting import PATIENCE_S


class Collector:
    """Listens on loopback.

    Attributes:
        resources: by service, the attributes of its processes.
    """

    def __init__(self, protocol: str = "http/protobuf") -> None:
        self.resources: dict[str, dict[str, Any]] = {}
        self._spans: list[Span] = []
        self._came = threading.Condition()
        self._protocol = protocol

    def __enter__(self) -> Self:
        if self._protocol == "grpc":
            self._grpc = grpc.server(ThreadPoolExecutor(2))
            add_TraceServiceServicer_to_server(_Servicer(self), self._grpc)  # type: ignore[no-untyped-call]
            port = self._grpc.add_insecure_port("127.0.0.1:0")
            self._grpc.start()
        else:
            self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
            threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._protocol == "grpc":
            self._grpc.stop(None).wait()
        else:
            self._http.shutdown()
            self._http.server_close()

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self._came:
            for of_process in request.resource_spans:
                said = {each.key: value_of(each.value) for each in of_process.resource.attributes}
                self.resources[said["service.name"]] = said
                for scope in of_process.scope_spans:
                    self._spans += scope.spans
            self._came.notify_all()

    def traces(self, most_s: float = PATIENCE_S, *, roots: int = 1) -> dict[str, list[Span]]:
        """By trace, its spans, once there are so many whose requests have been told of."""
        end_s = time.monotonic() + most_s
        with self._came:
            while sum(_is_root(span) for span in self._spans) < roots:
                assert self._came.wait(end_s - time.monotonic()), f"{len(self._spans)} spans came"
            found: dict[str, list[Span]] = {}
            for span in self._spans:
                found.setdefault(span.trace_id.hex(), []).append(span)
            return found

    def trace(self, trace_id: str, most_s: float = PATIENCE_S) -> list[Span]:
        """Of one trace its spans, once its request has been told of."""
        end_s = time.monotonic() + most_s
        with self._came:
            while True:
                spans = [span for span in self._spans if span.trace_id.hex() == trace_id]
                if any(_is_root(span) for span in spans):
                    return spans
                assert self._came.wait(end_s - time.monotonic()), f"nothing came of {trace_id}"


def _is_root(span: Span) -> bool:
    """Of a request, or of a job's row, which nobody serves."""
    return any(each.key == "hycluster.request.id" for each in span.attributes)


def _handler(collector: Collector) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            known = self.path == "/v1/traces"
            if known:
                collector.take(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if known else 404)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
            """Nobody reads it."""

    return Handler


class _Servicer(TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        self._collector.take(request)
        return ExportTraceServiceResponse()


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def attributes_of(span: Any) -> dict[str, Any]:
    """Of a span, or of one of its events."""
    return {each.key: value_of(each.value) for each in span.attributes}


def nested(spans: list[Span]) -> dict[str, list[str]]:
    """By a span's name, its children's. Fails unless all hang together and lie within each other."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    children: dict[str, list[str]] = {}
    roots = 0
    for span in spans:
        parent = by_id.get(span.parent_span_id)
        if parent is None:
            roots += 1
            children.setdefault("", []).append(span.name)
            continue
        slack = 2_000_000
        assert parent.start_time_unix_nano - slack <= span.start_time_unix_nano, (parent.name, span.name)
        assert span.end_time_unix_nano <= parent.end_time_unix_nano + slack, (parent.name, span.name)
        children.setdefault(parent.name, []).append(span.name)
    assert roots == 1, "one trace has one beginning"
    return children
