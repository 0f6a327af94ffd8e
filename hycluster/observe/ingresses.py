"""What came to this ingress process by HTTP and by gRPC, under ``/metrics``.

Names are those that dashboards for Python's web frameworks and for gRPC know. vLLM's app has a middleware of its own
for HTTP's; it counts one app's requests, nothing of what is refused before it, and registers its metrics once a
process, so that an app whose middleware is built a second time, which the ingress has to do, counts nothing. It is
taken out.

Durations and counts have exemplars, the trace of a request that took so long, where that is recorded
(``hycluster.timeline.exemplar``). Only OpenMetrics has them, which a scrape gets that asks for it (``Accept``).
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram, Summary

from hycluster.observe.catalogue import (
    CERTIFICATE_EXPIRES,
    GRPC_CALLS,
    GRPC_RUNNING,
    GRPC_SECONDS,
    HTTP_HIGH_RESOLUTION,
    HTTP_REQUEST_BYTES,
    HTTP_REQUESTS,
    HTTP_RESPONSE_BYTES,
    HTTP_RUNNING,
    HTTP_SECONDS,
    MetricSpec,
)

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
HIGH_RESOLUTION_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip


def _own(family: MetricSpec) -> list[str]:
    # The label `ingress` comes with the scrape.
    return [label for label in family.labels if label != "ingress"]


_http_requests = Counter(HTTP_REQUESTS.name, HTTP_REQUESTS.what, _own(HTTP_REQUESTS))
_http_seconds = Histogram(HTTP_SECONDS.name, HTTP_SECONDS.what, _own(HTTP_SECONDS), buckets=BUCKETS_S)
_http_all_seconds = Histogram(HTTP_HIGH_RESOLUTION.name, HTTP_HIGH_RESOLUTION.what, buckets=HIGH_RESOLUTION_S)
_http_request_bytes = Summary(HTTP_REQUEST_BYTES.name, HTTP_REQUEST_BYTES.what, _own(HTTP_REQUEST_BYTES))
_http_response_bytes = Summary(HTTP_RESPONSE_BYTES.name, HTTP_RESPONSE_BYTES.what, _own(HTTP_RESPONSE_BYTES))
_http_running = Gauge(HTTP_RUNNING.name, HTTP_RUNNING.what)
_grpc_calls = Counter(GRPC_CALLS.name, GRPC_CALLS.what, _own(GRPC_CALLS))
_grpc_seconds = Histogram(GRPC_SECONDS.name, GRPC_SECONDS.what, _own(GRPC_SECONDS), buckets=BUCKETS_S)
_grpc_running = Gauge(GRPC_RUNNING.name, GRPC_RUNNING.what)
_certificate_expires = Gauge(CERTIFICATE_EXPIRES.name, CERTIFICATE_EXPIRES.what)


def certificate_taken(expires_at: float) -> None:
    """Callers are shown another certificate from now on; in seconds since the epoch."""
    _certificate_expires.set(expires_at)


def http_began() -> None:
    """A request over HTTP."""
    _http_running.inc()


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One that has ended; see the metrics' own words.

    Attributes:
        trace: what points to it, if it is recorded: its exemplar.
    """

    model: str
    method: str
    handler: str
    status: int
    duration_s: float
    request_bytes: int
    response_bytes: int
    trace: dict[str, str] | None = None


def http_ended(request: HttpRequest, *, counted: bool = True) -> None:
    """What :func:`http_began` told of has come to its end."""
    _http_running.dec()
    if not counted:
        return
    trace = request.trace
    _http_requests.labels(request.model, request.method, request.handler, str(request.status)).inc(exemplar=trace)
    _http_seconds.labels(request.model, request.method, request.handler).observe(request.duration_s, trace)
    _http_all_seconds.observe(request.duration_s, trace)
    _http_request_bytes.labels(request.handler).observe(request.request_bytes)
    _http_response_bytes.labels(request.handler).observe(request.response_bytes)


def grpc_began() -> None:
    """A call by gRPC."""
    _grpc_running.inc()


def grpc_ended(
    model: str, service: str, method: str, code: str, duration_s: float, trace: dict[str, str] | None = None
) -> None:
    """What :func:`grpc_began` told of has come to its end."""
    _grpc_running.dec()
    _grpc_calls.labels(model, service, method, code).inc(exemplar=trace)
    _grpc_seconds.labels(model, service, method).observe(duration_s, trace)
