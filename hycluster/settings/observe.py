"""What is told of requests afterwards: timelines, traces, log lines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hycluster.settings.base import Strict

LEVELS = ("debug", "info", "warning", "error")


class Tracing(Strict):
    """Timelines of requests, which ``hycluster why`` shows, and their export as OpenTelemetry traces (OTLP). What is
    not set here is taken from the standard variables ``OTEL_*`` of the processes.

    Attributes:
        endpoint: where spans are sent, such as http://collector:4317. None: ``OTEL_EXPORTER_OTLP_ENDPOINT``; if that is
            not set either, nothing is exported.
        protocol: how. None: ``OTEL_EXPORTER_OTLP_PROTOCOL``; if that is not set either, grpc where the endpoint's port
            is 4317, else http/protobuf.
        sample_ratio: share of the requests that are exported whose callers say nothing about it; a caller's own trace
            is exported if that caller records it. None: ``OTEL_TRACES_SAMPLER``; if that is not set either, all.
        capture_content: also export prompts and outputs, as attributes of the spans.
        kept_requests: finished online requests whose timelines a process keeps, beside the 100 slowest of the last
            hour; of rows of batch work as many again.
    """

    endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    protocol: Literal["grpc", "http/protobuf"] | None = None
    sample_ratio: float | None = Field(default=None, ge=0, le=1)
    capture_content: bool = False
    kept_requests: int = Field(default=1000, ge=1, le=100_000)


class Logs(Strict):
    """Log lines of the processes of a service.

    Attributes:
        level: the least that is written.
        requests: write a line for each request that ends, at info, with its id, duration and tokens; then ``level`` may
            stay at warning.
        format: json is one object a line. auto is text at a terminal and json elsewhere.
    """

    level: Literal["debug", "info", "warning", "error"] = "warning"
    requests: bool = False
    format: Literal["auto", "json", "text"] = "auto"
