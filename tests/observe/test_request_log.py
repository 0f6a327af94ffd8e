from __future__ import annotations

import logging

import pytest

from hycluster.observe.request_log import MOST_REFUSED, RequestLines, log_requests
from hycluster.observe.timelines import Recorder
from hycluster.settings.observe import Logs
from hycluster.trace_context import TraceContext
from tests.timelines import begun, ended, migrated


def test_a_line_a_request(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    log_requests(recorder, Logs(requests=True))
    timeline = migrated()
    timeline.sampled, timeline.trace_id = True, 0xABC
    with caplog.at_level(logging.INFO, "hycluster.requests"):
        recorder.end(timeline)
    (record,) = caplog.records
    assert record.getMessage() == "POST /v1/chat/completions tiny ok 3.000 s, 10 tokens in, 8 out"
    said = vars(record)
    assert (said["request_id"], said["replicas"], said["ttft_s"]) == ("r", "r1", 1.0)
    assert said["trace_id"] == f"{0xABC:032x}"


def test_nobody_asked() -> None:
    recorder = Recorder()
    log_requests(recorder, Logs())
    assert recorder.ended == []


def test_a_flood_of_refusals_is_counted_and_not_written(caplog: pytest.LogCaptureFixture) -> None:
    lines = RequestLines()
    with caplog.at_level(logging.INFO, "hycluster.requests"):
        for number in range(500):
            timeline = begun(f"refused-{number}", parent=TraceContext(1, 2, False))
            timeline.began_s += number / 1000
            lines(ended(timeline, 1.0, "failed", "Overloaded: too many"))
        late = begun("late")
        late.began_s += 5
        lines(ended(late, 6.0, "failed", "Overloaded: too many"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == MOST_REFUSED + 2
    assert said[-2] == f"{500 - MOST_REFUSED} more requests that came to no engine"
