"""Whole jobs on a real Ray and real Parquet; only the engines are a stand-in."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.batch.input.corpus import plan_shards
from hycluster.batch.job import Job
from hycluster.batch.output.lease import Lease
from hycluster.batch.output.verify import verify_output
from hycluster.batch.progress.status import Status, Watcher
from hycluster.batch.prompts import prompt_of
from hycluster.batch.run import Engines, run_job
from hycluster.consent import ask
from hycluster.errors import JobFailed, SettingsError, TooManyQuarantined
from tests.batch.conftest import MakeJob, broken_utf8, damage, write_texts
from tests.batch.stand_in import stand_in
from tests.located import at
from tests.object_store import BUCKET, ObjectStore
from tests.waiting import PATIENCE_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    # Ray Data sets its own deprecated fields whenever its settings are copied.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
]


def engines(log: Path | None = None) -> Engines:
    return lambda _: nullcontext(stand_in(log))


def no_engines(job: Job) -> Any:
    raise AssertionError("this job must not start engines")


def read_out(job: Job) -> list[dict[str, Any]]:
    """What a reader that follows the manifest sees."""
    out = Path(job.output.path)
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (out / "_SUCCESS").exists()
    tables = [pq.read_table(out / shard["part"]["path"]) for shard in manifest["shards"] if shard["part"]]
    return [row for table in tables for row in table.to_pylist()]


def test_every_row_is_there_once_in_order(make_job: MakeJob, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job()
    run_job(job, engines=engines())
    rows = read_out(job)
    assert [row["row_id"] for row in rows] == [
        *(f"a/z.parquet#{n}" for n in range(5)),
        *(f"b.parquet#{n}" for n in range(7)),
    ]
    assert [row["output"] for row in rows] == [row["text"].upper() for row in rows]
    assert len(list(Path(job.output.path).glob("part-*.parquet"))) == 7
    run_job(job, engines=no_engines)
    assert "already done" in capsys.readouterr().out


def test_input_columns_come_out_unchanged(make_job: MakeJob, corpus: Path) -> None:
    words = pa.array(["x", None]).dictionary_encode()
    table = pa.table(
        {
            "text": pa.array(["a", "b"], pa.large_string()),
            "when": pa.array([0, None], pa.timestamp("ms", tz="UTC")),
            "tags": [["p", "q"], None],
            "nested": [{"k": 1, "v": [b"\xff"]}, None],
            "kind": words,
            "price": pa.array([None, None], pa.decimal128(7, 2)),
        }
    ).replace_schema_metadata({"made": "by hand"})
    pq.write_table(table, corpus / "c.parquet")
    job = make_job(input={"path": str(corpus / "c.parquet"), "columns": {"text": "text"}})
    run_job(job, engines=engines())
    (part,) = Path(job.output.path).glob("part-*.parquet")
    out = pq.read_table(part)
    assert out.schema.names == [
        *table.schema.names,
        "row_id",
        "output",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
    ]
    assert out.select(table.schema.names).cast(table.schema) == table
    assert [out.schema.field(name).type for name in table.schema.names] == table.schema.types
    assert [str(out.schema.field(name).type) for name in out.schema.names[-5:]] == [
        "string",
        "string",
        "string",
        "int64",
        "int64",
    ]


def test_files_may_differ_in_columns_that_the_job_does_not_read(make_job: MakeJob, corpus: Path) -> None:
    pq.write_table(pa.table({"text": ["more"], "extra": [1.5]}), corpus / "c.parquet")
    job = make_job()
    run_job(job, engines=engines())
    rows = read_out(job)
    assert rows[-1]["extra"] == 1.5
    assert "id" in rows[0]
    assert "extra" not in rows[0]


def test_odd_keys_of_a_bucket_and_what_they_tell(make_job: MakeJob, corpus: Path, store: ObjectStore) -> None:
    """From a bucket to a bucket, in folders of Hive's whose names are a column and a placeholder."""
    keys = {
        "country=a%2Fb/a%2Fb.parquet": "a/b",
        "country=de/a b.parquet": "de",
        "country=x y/é+&?#=100%.parquet": "x y",
        "country=中国/数据=1.parquet": "中国",
    }
    lost = {
        "country=__HIVE_DEFAULT_PARTITION__/n.parquet#0": "NullValue",
        "country=de//lost.parquet": "UnreadableFile",
        "country=de/z.parquet#0": "NullValue",
    }
    write_texts(corpus / "b.parquet", ["hello"])
    write_texts(corpus / "null.parquet", [None])
    for key in (*keys, *(row_id.partition("#")[0] for row_id in lost)):
        data = (corpus / ("null.parquet" if "/z." in key else "b.parquet")).read_bytes()
        httpx.put(f"http://{store.address}/{BUCKET}/odd in/{quote(key)}", content=data, timeout=60).raise_for_status()
    job = make_job(
        prompt="{text} from {country}",
        input={"path": store.uri("odd in")},
        output={"path": store.uri("odd out/数据 1")},
        max_quarantined_fraction=0.5,
    )
    run_job(job, engines=engines())
    assert verify_output(at(job.output.path), at(job.input.path)).faults == []
    out = at(job.output.path)
    shards = (out.read_json("_manifest.json") or {})["shards"]

    def rows_of(kind: str) -> list[dict[str, Any]]:
        read = [out.open_file(shard[kind]["path"]).readall() for shard in shards if shard[kind]]
        return [row for data in read for row in pq.read_table(pa.BufferReader(data)).to_pylist()]

    assert [(row["row_id"], row["country"], row["output"]) for row in rows_of("part")] == [
        (f"{key}#0", country, f"HELLO FROM {country.upper()}") for key, country in keys.items()
    ]
    assert {row["row_id"]: row["error_type"] for row in rows_of("quarantine")} == lost


def test_a_failed_job_goes_on_where_it_stopped(make_job: MakeJob, corpus: Path, tmp_path: Path) -> None:
    broken = tmp_path / "engine-is-down"
    broken.touch()
    write_texts(corpus / "c.parquet", ["fine", "fine", "fine", f"die {broken}"])
    job = make_job(rows_in_flight=1)
    out = Path(job.output.path)
    with pytest.raises(
        JobFailed, match=r"row test-c.parquet#3: no engine could serve it for 0 s: the stand-in is down"
    ):
        run_job(job, engines=engines())
    assert not (out / "_SUCCESS").exists()
    assert not (out / "_manifest.json").exists()
    before = {json.loads(path.read_text())["part"]["path"] for path in (out / "_shards").glob("[0-9]*.json")}
    # One row at a time: the shards before the one that failed are there, but for those being written.
    assert 5 <= len(before) <= 8
    (out / "part-00000008-deadbeef0000.parquet").write_bytes(b"a torn attempt")
    broken.unlink()
    run_job(job, engines=engines())
    rows = read_out(job)
    assert len({row["row_id"] for row in rows}) == len(rows) == 16
    after = {path.name for path in out.glob("part-*.parquet")}
    assert before < after
    assert len(after) == 9


def test_a_generate_process_that_is_killed_costs_no_row_and_doubles_none(
    make_job: MakeJob, corpus: Path, tmp_path: Path
) -> None:
    trigger = tmp_path / "kill-me"
    trigger.touch()
    write_texts(corpus / "c.parquet", ["fine", "fine", "fine", f"kill {trigger}", "fine"])
    job = make_job(rows_in_flight=4)
    run_job(job, engines=engines())
    assert not trigger.exists()
    ids = [row["row_id"] for row in read_out(job)]
    assert len(set(ids)) == len(ids) == 17


def test_another_job_on_the_same_output_is_refused(make_job: MakeJob) -> None:
    run_job(make_job(), engines=engines())
    with pytest.raises(SettingsError, match=r"sampling.max_tokens: was None, is 8"):
        run_job(make_job(sampling={"max_tokens": 8}), engines=no_engines)


def test_a_second_run_on_the_same_output_is_told_who_is_there(make_job: MakeJob) -> None:
    job = make_job()
    with Lease(at(job.output.path)) as lease:
        lease.take()
        with pytest.raises(JobFailed, match=rf"is being written by another run \(host .+, pid {os.getpid()}, since"):
            run_job(job, engines=no_engines)
    assert [path.name for path in Path(job.output.path).iterdir()] == ["_coordinator"]
    run_job(job, engines=engines())
    assert len(read_out(job)) == 12


def test_overwrite_replaces_another_job_and_resumes_this_one(make_job: MakeJob) -> None:
    run_job(make_job(), engines=engines())
    job = make_job(prompt="new {text}")
    asked: list[str] = []
    run_job(job, engines=engines(), overwrite=True, consent=asked.append)
    assert {row["output"][:4] for row in read_out(job)} == {"NEW "}
    (what,) = asked
    assert f"{job.output.path} is the output of another job or input, with 12 committed rows" in what
    run_job(job, engines=no_engines, overwrite=True, consent=asked.append)
    assert len(asked) == 1


def test_an_output_that_nobody_agrees_to_lose_stays(make_job: MakeJob) -> None:
    run_job(old := make_job(), engines=engines())
    there = sorted(Path(old.output.path).rglob("*"))
    with pytest.raises(SettingsError, match=r"^--yes: must be given"):
        run_job(
            make_job(prompt="new {text}"), engines=no_engines, overwrite=True, consent=functools.partial(ask, yes=False)
        )
    assert sorted(Path(old.output.path).rglob("*")) == there


def test_too_many_quarantined_rows_end_the_job_until_the_limit_is_raised(make_job: MakeJob, corpus: Path) -> None:
    write_texts(corpus / "c.parquet", ["fine", None, "refuse"])
    job = make_job(max_quarantined_fraction=0.1)
    said = r"2 of 15 rows .* more than 0.1 of them; see .*/out/_quarantine\. .* --set max_quarantined_fraction=0\.\d+$"
    with pytest.raises(TooManyQuarantined, match=said):
        run_job(job, engines=engines())
    assert not (Path(job.output.path) / "_SUCCESS").exists()
    assert "state ended: max_quarantined_fraction: 2 of 15 rows" in Watcher(at(job.output.path)).look().line()
    report = json.loads((Path(job.output.path) / "_report.json").read_text())
    assert report["quarantine_reasons"] == {"NullValue": 1, "Refused": 1}
    job = make_job(max_quarantined_fraction=0.2)
    run_job(job, engines=engines())
    quarantined = pq.read_table(Path(job.output.path) / "_quarantine").to_pylist()
    assert {row["row_id"]: row["error_message"] for row in quarantined} == {
        "c.parquet#1": "text: is null",
        "c.parquet#2": "prompt: refused by the stand-in",
    }
    assert len(read_out(job)) == 13


def write_every_kind_of_fault(corpus: Path) -> None:
    write_texts(corpus / "0-broken.parquet", [f"never seen {n}" for n in range(40)])
    (corpus / "0-broken.parquet").write_bytes((corpus / "0-broken.parquet").read_bytes()[:-9])
    pq.write_table(pa.table({"text": [[1], None, [3]], "id": ["p", "q", "r"]}), corpus / "c-types.parquet")
    pq.write_table(pa.table({"words": ["w"]}), corpus / "d-missing.parquet")
    write_texts(corpus / "e-damaged.parquet", [f"text {n} " + "x" * n for n in range(9)], row_group_size=3)
    damage(corpus / "e-damaged.parquet", 1, 1)
    texts = [b"good", b"bad \xff", None, b" ", b"please refuse", b"overlong", b"poison", b"good too"]
    rows = pa.table({"text": broken_utf8(texts), "id": pa.array(range(len(texts)), pa.int32())})
    pq.write_table(rows, corpus / "f-rows.parquet")


def test_every_kind_of_bad_row_and_file_is_quarantined_with_its_reason(
    make_job: MakeJob, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_every_kind_of_fault(corpus)
    job = make_job(retry_s=30)
    whole = plan_shards(at(corpus), shard_rows=2, check=prompt_of(job).check)
    bad = {
        "0-broken.parquet": "UnreadableFile",
        **{f"c-types.parquet#{n}": "WrongType" for n in range(3)},
        "d-missing.parquet#0": "MissingColumn",
        **{f"e-damaged.parquet#{n}": "UnreadableRows" for n in (3, 4, 5)},
        "f-rows.parquet#1": "InvalidUtf8",
        "f-rows.parquet#2": "NullValue",
        "f-rows.parquet#3": "EmptyValue",
        "f-rows.parquet#4": "Refused",
        "f-rows.parquet#5": "PromptTooLong",
        "f-rows.parquet#6": "Poison",
    }
    assert whole.rows == 12 + 1 + 3 + 1 + 9 + 8
    assert whole.unseen_rows > 5
    lost, rows = len(bad) + whole.unseen_rows, whole.rows + whole.unseen_rows
    out = Path(job.output.path)
    with pytest.raises(
        TooManyQuarantined, match=rf"{lost} of {rows} rows .*by their size: 1, such as 0-broken.parquet"
    ):
        run_job(make_job(retry_s=30, max_quarantined_fraction=(lost - 0.5) / rows), engines=engines())
    assert not (out / "_SUCCESS").exists()
    assert "quarantined: MissingColumn: input: d-missing.parquet: no column 'text'" in capsys.readouterr().out
    run_job(make_job(retry_s=30, max_quarantined_fraction=lost / rows), engines=engines())

    found: dict[str, Any] = {}
    for path in (out / "_quarantine").glob("*.parquet"):
        table = pq.read_table(path)
        if "text" in table.schema.names and pa.types.is_string(table.schema.field("text").type):
            table = table.set_column(table.schema.get_field_index("text"), "text", table["text"].cast(pa.binary()))
        found |= {row["row_id"]: row for row in table.to_pylist()}
    assert {row_id: row["error_type"] for row_id, row in found.items()} == bad
    assert all(row["error_message"] for row in found.values())
    assert found["0-broken.parquet"].keys() == {"row_id", "error_type", "error_message"}
    assert (found["c-types.parquet#2"]["text"], found["c-types.parquet#2"]["id"]) == ([3], "r")
    assert found["d-missing.parquet#0"]["words"] == "w"
    assert (found["e-damaged.parquet#4"]["text"], found["e-damaged.parquet#4"]["id"]) == (None, None)
    assert (found["f-rows.parquet#1"]["text"], found["f-rows.parquet#1"]["id"]) == (b"bad \xff", 1)
    assert "3 stand-ins in a row died" in found["f-rows.parquet#6"]["error_message"]
    assert len(read_out(job)) == whole.rows - len(bad)
    assert not (out / "_progress.json").exists()
    assert verify_output(at(job.output.path), at(job.input.path)).faults == []
    reasons = Counter(bad.values())
    assert json.loads((out / "_report.json").read_text())["quarantine_reasons"] == reasons
    write_texts(corpus / "0-broken.parquet", ["readable now"])
    (fault,) = verify_output(at(job.output.path), at(job.input.path)).faults
    assert "is not what the job ran on" in fault


def test_a_large_file_that_cannot_be_read_ends_the_job(make_job: MakeJob, corpus: Path) -> None:
    (corpus / "z.parquet").write_bytes(b"not Parquet" * 1000)
    job = make_job(max_quarantined_fraction=0.5)
    with pytest.raises(TooManyQuarantined, match=r"such as z.parquet"):
        run_job(job, engines=engines())
    out = Path(job.output.path)
    (kept,) = (out / "_quarantine").glob("*.parquet")
    assert pq.read_table(kept).column("row_id").to_pylist() == ["z.parquet"]
    assert not (out / "_SUCCESS").exists()


def test_a_running_job_says_how_far_it_is(make_job: MakeJob, corpus: Path, tmp_path: Path) -> None:
    down = tmp_path / "engine-is-down"
    down.touch()
    write_texts(corpus / "c.parquet", ["fine", None, f"die {down}"])
    job = make_job(retry_s=60, max_quarantined_fraction=1, shard_rows=100)
    seen: list[Status] = []

    def look() -> None:
        watcher = Watcher(at(job.output.path))
        end_s = time.monotonic() + 2 * PATIENCE_S
        while not (seen and seen[-1].word and seen[-1].word.progress.retries) and time.monotonic() < end_s:
            time.sleep(0.1)
            if (Path(job.output.path) / "_job.json").exists():
                seen.append(watcher.look())
        down.unlink()

    looking = threading.Thread(target=look)
    looking.start()
    run_job(job, engines=engines())
    looking.join()
    live = seen[-1]
    assert (live.shards_done, live.rows_through) == (2, 14)
    assert live.word is not None
    assert (live.word.progress.in_flight, live.word.progress.reasons) == (1, {"NullValue": 1})
    assert "state running, last commit" in live.line()
    assert "quarantined 1 (this run: NullValue 1)" in live.line()
    status = Watcher(at(job.output.path)).look()
    assert (status.finished, status.word) == (True, None)


def test_a_full_cluster_does_not_block_the_job(make_job: MakeJob) -> None:
    import ray

    class EveryCpu:
        def here(self) -> bool:
            return True

    # Ray Data may not have let go of all workers of the last job yet.
    free = ray.available_resources()["CPU"]
    engine: Any = ray.remote(num_cpus=free)(EveryCpu).remote()
    try:
        assert ray.get(engine.here.remote(), timeout=60)
        job = make_job()
        run_job(job, engines=engines())
        assert len(read_out(job)) == 12
    finally:
        ray.kill(engine)


def test_many_shards_by_several_processes_within_the_bound(make_job: MakeJob, corpus: Path, tmp_path: Path) -> None:
    write_texts(corpus / "c.parquet", [f"long {n}" for n in range(3000)], row_group_size=400)
    job = make_job(shard_rows=7, rows_in_flight=16, generate_processes=2)
    log = tmp_path / "most"
    run_job(job, engines=engines(log))
    assert len(read_out(job)) == 3012
    assert 1 < int(log.read_text()) <= 8


def test_an_input_without_rows_is_done_at_once(make_job: MakeJob, tmp_path: Path) -> None:
    write_texts(tmp_path / "none" / "e.parquet", [])
    job = make_job(input={"path": str(tmp_path / "none"), "columns": {"text": "text"}})
    run_job(job, engines=no_engines)
    assert read_out(job) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": {"path": "nowhere", "columns": {"text": "text"}}}, "^input.path: 'nowhere': no such file"),
        ({"prompt": "{nothing}"}, "^input: a/z.parquet: no column 'nothing'; there are id, text"),
    ],
)
def test_bad_input_is_refused_before_any_work(make_job: MakeJob, changes: dict[str, Any], said: str) -> None:
    job = make_job(**changes)
    with pytest.raises(SettingsError, match=said):
        run_job(job, engines=no_engines)
    assert not Path(job.output.path).exists()


def test_an_output_inside_the_input_is_refused(make_job: MakeJob, corpus: Path) -> None:
    with pytest.raises(SettingsError, match="lies within the input"):
        run_job(make_job(output={"path": str(corpus / "out")}), engines=no_engines)


def test_ray_data_settings_of_the_process_are_left_as_they_were(make_job: MakeJob) -> None:
    from ray.data import DataContext

    before = DataContext.get_current()
    bars, size = before.enable_progress_bars, before.target_max_block_size
    run_job(make_job(), engines=engines())
    assert DataContext.get_current() is before
    assert (before.enable_progress_bars, before.target_max_block_size) == (bars, size)


def test_a_finished_job_has_its_report_and_can_be_verified(
    make_job: MakeJob, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(corpus / "c.parquet", ["fine", None, "refuse"], row_group_size=1)
    job = make_job(max_quarantined_fraction=0.2, shard_rows=3)
    run_job(job, engines=engines())
    assert f"report: {job.output.path}/_report.html" in capsys.readouterr().out
    assert verify_output(at(job.output.path), at(job.input.path)).faults == []
    out = Path(job.output.path)
    report = json.loads((out / "_report.json").read_text())
    assert report["totals"] == json.loads((out / "_manifest.json").read_text())["totals"]
    assert report["quarantine_reasons"] == {"NullValue": 1, "Refused": 1}
    assert report["busy_s"] > 0
    assert "Rows over time" in (out / "_report.html").read_text()
    assert (out / "_report.html").stat().st_mtime_ns <= (out / "_SUCCESS").stat().st_mtime_ns


def test_fifty_long_documents_become_a_summary_each(make_job: MakeJob, tmp_path: Path) -> None:
    texts = [f"Document {n}. " + "Some words are here. " * (400 + 40 * n) for n in range(50)]
    write_texts(tmp_path / "long" / "a.parquet", texts)
    job = make_job(
        task="summarize",
        summary={"keep_tree": True, "overlap_tokens": 20},
        input={"path": str(tmp_path / "long"), "columns": {"text": "text"}},
        sampling={"max_tokens": 50},
        shard_rows=8,
        rows_in_flight=16,
    )
    log = tmp_path / "most"
    run_job(job, engines=engines(log))
    rows = read_out(job)
    assert [row["row_id"] for row in rows] == [f"a.parquet#{n}" for n in range(50)]
    for row in rows:
        nodes = json.loads(row["tree"])["nodes"]
        parts = [node for node in nodes if node["level"] == 0]
        assert "".join(row["text"][part["start"] : part["end"]] for part in parts) == row["text"]
        assert row["output"] == nodes[-1]["summary"]
    assert int(log.read_text()) == 16
