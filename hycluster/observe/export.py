"""The export of traces: OpenTelemetry's SDK, imported only where there is somewhere to send them.

Spans are made of a timeline when it has ended (``spans.py``, ``span_writer.py``). Until then a request carries the ids
of its own span and no object of the SDK's, and whether it is recorded is a comparison of numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from hycluster.errors import SettingsError, shown
from hycluster.observe.timelines import Recorder, Sampler, never
from hycluster.observe.traces import span_metrics
from hycluster.settings.observe import Tracing
from hycluster.timeline import Timeline
from hycluster.trace_context import TraceContext

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SAMPLER, SAMPLER_ARGUMENT = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
GRPC_PORT = 4317
_HALF = (1 << 64) - 1


def endpoint_of(tracing: Tracing, environment: Mapping[str, str] = os.environ) -> str | None:
    """Where spans are to be sent; None: nowhere."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return None
    said = (environment.get(name, "").strip() for name in ENDPOINTS)
    return tracing.endpoint or next(filter(None, said), None)


def sampler_of(tracing: Tracing, environment: Mapping[str, str] = os.environ) -> Sampler:
    """Whether a request is recorded, by the settings or by the standard variables.

    Raises:
        SettingsError: a variable says what is not known here.
    """
    if tracing.sample_ratio is not None:
        return _sampler(tracing.sample_ratio, by_parent=True)
    said = environment.get(SAMPLER, "").strip() or "parentbased_always_on"
    by_parent, name = said.startswith("parentbased_"), said.removeprefix("parentbased_")
    if name not in ("always_on", "always_off", "traceidratio"):
        raise SettingsError(
            f"{SAMPLER}: {shown(said)} is not allowed; must be always_on, always_off, traceidratio, or one of these"
            " after parentbased_"
        )
    ratio = {"always_on": 1.0, "always_off": 0.0}.get(name)
    if ratio is None:
        argument = environment.get(SAMPLER_ARGUMENT, "").strip() or "1"
        try:
            ratio = float(argument)
        except ValueError:
            ratio = -1.0
        if not 0 <= ratio <= 1:
            raise SettingsError(f"{SAMPLER_ARGUMENT}: {shown(argument)} is not allowed; must be from 0 to 1")
    return _sampler(ratio, by_parent=by_parent)


def _sampler(ratio: float, *, by_parent: bool) -> Sampler:
    # As OpenTelemetry's own: by the lower half of the trace's id, so that all that a trace passes decide the same.
    bound = round(ratio * (1 << 64))

    def samples(trace_id: int, parent: TraceContext | None) -> bool:
        if by_parent and parent is not None:
            return parent.sampled
        return trace_id & _HALF < bound

    return samples


class Export:
    """Sends the spans of what a recorder records, from the opening of a process to its end.

    Args:
        attributes: of every request's span, such as ``server.address``.

    Raises:
        SettingsError: the settings or the standard variables say what is not allowed.

    Attributes:
        on: there is somewhere to send them.
    """

    def __init__(
        self,
        recorder: Recorder,
        tracing: Tracing,
        *,
        instance: str = "",
        attributes: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._recorder = recorder
        self._attributes = dict(attributes or {})
        recorder.keep(tracing.kept_requests)
        endpoint = endpoint_of(tracing, environment)
        self.on = endpoint is not None
        if endpoint is None:
            return
        samples = sampler_of(tracing, environment)
        from hycluster.observe.span_writer import SpanWriter

        self._writer = SpanWriter(_exporter(endpoint, tracing, environment), recorder.process, instance)
        span_metrics.watch("spans", self._writer)
        recorder.samples, recorder.captures = samples, tracing.capture_content
        recorder.ended.append(self._tell)
        recorder.flush = self._writer.flush

    def _tell(self, timeline: Timeline) -> None:
        if timeline.sampled:
            timeline.attributes = self._attributes | timeline.attributes
            self._writer.write(timeline)

    def close(self) -> None:
        """Send what is left, but don't wait long for it. May be called from any thread."""
        if self.on:
            self.on = False
            self._recorder.samples, self._recorder.captures = never, False
            self._recorder.ended.remove(self._tell)
            self._recorder.flush = lambda: None
            self._writer.close()


def export_of_a_job(recorder: Recorder) -> None:
    """Have a batch job's process export by the standard variables, until it is killed; a service's process does
    already, by its settings."""
    if not recorder.ended:
        Export(recorder, Tracing())


def _exporter(endpoint: str, tracing: Tracing, environment: Mapping[str, str]) -> Any:
    said = (environment.get(name, "").strip() for name in PROTOCOLS)
    protocol: str | None = tracing.protocol or next(filter(None, said), None)
    if protocol is None:
        protocol = "grpc" if urlsplit(endpoint).port == GRPC_PORT else "http/protobuf"
    # What comes from the variables the exporter reads itself, with the path, headers and certificates that they say.
    given: dict[str, Any] = {}
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        if tracing.endpoint:
            given = {"endpoint": endpoint, "insecure": urlsplit(endpoint).scheme == "http"}
        return GrpcExporter(**given)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        if tracing.endpoint:
            path = urlsplit(endpoint).path.strip("/")
            given = {"endpoint": endpoint if path else f"{endpoint.rstrip('/')}/v1/traces"}
        return HttpExporter(**given)
    raise SettingsError(f"{PROTOCOLS[1]}: {shown(protocol)} is not allowed; must be grpc or http/protobuf")
