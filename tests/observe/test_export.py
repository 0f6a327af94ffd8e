"""Traces as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hycluster.errors import SettingsError
from hycluster.observe import span_writer
from hycluster.observe.export import Export, endpoint_of, sampler_of
from hycluster.observe.timelines import Recorder
from hycluster.settings.observe import Tracing
from hycluster.trace_context import TraceContext
from tests.otlp_collector import Collector, attributes_of, nested
from tests.timelines import migrated, usual

NOWHERE = dict[str, str]()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_gets_whole_traces(protocol: str) -> None:
    recorder = Recorder()
    recorder.process = "ingress"
    with Collector(protocol) as collector:
        tracing = Tracing.model_validate({"endpoint": collector.endpoint, "protocol": protocol})
        export = Export(recorder, tracing, instance="one", attributes={"server.port": 8000}, environment=NOWHERE)
        for timeline in (usual(), migrated()):
            timeline.sampled = True
            recorder.end(timeline)
        unsampled = usual()
        recorder.end(unsampled)
        export.close()
        traces = collector.traces(roots=2)
    assert len(traces) == 2
    trees = [nested(spans) for spans in traces.values()]
    assert [tree[""] for tree in trees] == [["chat tiny"], ["chat tiny"]]
    assert trees[1]["chat tiny"] == ["receive", "prepare", "generate r0", "migrate", "generate r1"]
    root = next(iter(traces.values()))[0]
    assert attributes_of(root)["server.port"] == 8000
    assert attributes_of(root)["gen_ai.usage.output_tokens"] == 8
    assert collector.resources["hycluster-ingress"]["service.instance.id"] == "one"


def test_the_standard_variables_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=search")
        export = Export(recorder, Tracing())
        timeline = usual()
        timeline.parent, timeline.sampled = TraceContext(timeline.trace_id, 77, True, "vendor=1"), True
        recorder.end(timeline)
        recorder.flush()
        (spans,) = collector.traces().values()
        export.close()
    assert int.from_bytes(spans[0].parent_span_id) == 77
    assert spans[0].trace_state == "vendor=1"
    assert collector.resources["mine"]["team"] == "search"


def test_a_collector_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_writer, "CLOSE_WITHIN_S", 0.2)
    recorder = Recorder()
    export = Export(recorder, Tracing(endpoint="http://127.0.0.1:9"), environment=NOWHERE)
    assert recorder.samples(1, None)
    timeline = usual()
    timeline.sampled = True
    recorder.end(timeline)
    begun_s = time.monotonic()
    export.close()
    assert time.monotonic() - begun_s < 10
    assert recorder.ended == []
    assert not recorder.samples(1, None)


def test_off_is_off() -> None:
    said = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}
    assert endpoint_of(Tracing(), said) == "http://c:4318"
    assert endpoint_of(Tracing(endpoint="http://mine:4317"), said) == "http://mine:4317"
    assert endpoint_of(Tracing(), said | {"OTEL_SDK_DISABLED": "true"}) is None
    assert endpoint_of(Tracing(), said | {"OTEL_TRACES_EXPORTER": "none"}) is None
    assert endpoint_of(Tracing(), NOWHERE) is None
    recorder = Recorder()
    assert not Export(recorder, Tracing(), environment=NOWHERE).on
    assert recorder.ended == []
    assert not recorder.begin("a", "row").sampled


def test_off_imports_no_sdk() -> None:
    code = (
        "import sys; from hycluster.observe.export import Export, Tracing;"
        "from hycluster.observe.timelines import recorder;"
        "Export(recorder, Tracing()); recorder.end(recorder.begin('a', 'row'));"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert said.stdout.strip() == "[]"


@pytest.fixture
def ids() -> range:
    return range(0, 1 << 64, (1 << 64) // 1000)


@pytest.mark.parametrize(
    ("ratio", "said", "share"),
    [
        (None, NOWHERE, 1.0),
        (0.01, NOWHERE, 0.01),
        (0.0, NOWHERE, 0.0),
        (None, {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, 0.25),
        (None, {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, 0.25),
        (None, {"OTEL_TRACES_SAMPLER": "always_off"}, 0.0),
        (0.5, {"OTEL_TRACES_SAMPLER": "always_off"}, 0.5),
    ],
)
def test_which_share_is_sampled(ratio: float | None, said: dict[str, str], share: float, ids: range) -> None:
    samples = sampler_of(Tracing(sample_ratio=ratio), said)
    assert sum(samples(trace_id, None) for trace_id in ids) / len(ids) == pytest.approx(share, abs=0.002)


def test_a_callers_word_counts_where_it_is_to() -> None:
    yes, no = TraceContext(1, 1, True), TraceContext(1, 1, False)
    for said, expected in (
        ({}, (True, False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, (True, False)),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, (True, True)),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, (False, False)),
    ):
        samples = sampler_of(Tracing(), said)
        assert (samples(1, yes), samples(1, no)) == expected


@pytest.mark.parametrize(
    "said",
    [
        {"OTEL_TRACES_SAMPLER": "jaeger_remote"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "much"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1.5"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"},
    ],
)
def test_what_is_not_known_is_refused_by_its_name(said: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"^OTEL_\w+: '.+' is not allowed; must be"):
        Export(Recorder(), Tracing(endpoint="http://c:4318"), environment=said)
