from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hycluster.batch.progress.figures import TIMES, Spans, busy_s, length_figures, throughput, write_report
from hycluster.errors import SettingsError
from tests.batch.committed import commit_all, parts
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at


def test_a_report_of_what_is_committed(make_job: MakeJob, corpus: Path) -> None:
    write_texts(corpus / "c.parquet", ["one two three", None, "", "last"])
    out = commit_all(make_job(), apart_s=60)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    report = write_report(at(out))
    assert json.loads((out / "_report.json").read_text()) == report
    assert report["totals"] == {"rows": 16, "quarantined": 1, "prompt_tokens": 43, "completion_tokens": 28}
    assert report["shards"] == 9
    assert report["finish_reasons"] == {"stop": 14, "length": 1}
    assert report["quarantine_reasons"] == {"NullValue": 1}
    lengths = report["completion_tokens"]
    assert (lengths["p50"], lengths["p99"], lengths["max"]) == (2, 3, 3)
    assert lengths["bins"] == [
        {"from_tokens": 0, "rows": 1},
        {"from_tokens": 1, "rows": 1},
        {"from_tokens": 2, "rows": 12},
        {"from_tokens": 3, "rows": 1},
    ]
    # Shard n began n minutes after shard 0, and all ended at once.
    assert [shard["shard"] for shard in report["slowest_shards"]] == list(range(9))
    assert report["slowest_shards"][3]["input_file"] == "b.parquet"
    assert {path: path.read_bytes() for path in before} == before
    assert len(parts(out)) == 9


def test_a_report_of_nothing(make_job: MakeJob, tmp_path: Path) -> None:
    out = commit_all(make_job(), first=0, finish=False)
    report = write_report(at(out))
    assert (report["shards"], report["throughput"], report["rows_per_s"]) == (0, [], None)
    assert "0 of 12" in (out / "_report.html").read_text()
    with pytest.raises(SettingsError, match=r"^OUTPUT: '.*' holds no output of a job"):
        write_report(at(tmp_path))


def spans_of(*shards: tuple[float, float, int, int]) -> Spans:
    spans = Spans()
    for shard in shards:
        spans.add(*shard)
    return spans


def test_time_in_work_has_no_pauses_and_nothing_twice() -> None:
    assert busy_s(spans_of((5, 20, 1, 1), (0, 10, 1, 1), (6, 7, 1, 1), (1000, 1010, 1, 1))) == 30
    assert busy_s(Spans()) == 0


def test_throughput_spreads_shards_over_their_time_and_loses_nothing() -> None:
    times = throughput(spans_of((0.0, 60.0, 60, 600), (30.0, 90.0, 120, 0), (119.5, 120.0, 5, 50), (7.0, 7.0, 3, 3)))
    assert len(times) == TIMES
    assert times[10] == {"from_s": 10.0, "rows_per_s": pytest.approx(1), "tokens_per_s": pytest.approx(10)}
    assert times[45]["rows_per_s"] == pytest.approx(3)
    assert times[100]["rows_per_s"] == 0
    assert sum(time["rows_per_s"] for time in times) == pytest.approx(188)
    assert sum(time["tokens_per_s"] for time in times) == pytest.approx(653)


def test_lengths_are_binned_into_few_bins() -> None:
    found = length_figures(Counter(dict.fromkeys(range(1, 1001), 2)))
    assert (found["p50"], found["p90"], found["p99"], found["max"]) == (500, 900, 990, 1000)
    assert len(found["bins"]) == 39
    assert sum(bin_["rows"] for bin_ in found["bins"]) == 2000
