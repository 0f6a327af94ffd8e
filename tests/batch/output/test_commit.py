from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.batch.input.corpus import SHARD_BYTES, plan_shards
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.identity import identity
from hycluster.batch.output.record import ShardRecord
from hycluster.batch.prompts import prompt_of
from hycluster.errors import JobFailed, SettingsError
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at


def results(*ids: str) -> pa.Table:
    tokens = pa.array([2] * len(ids), pa.int64())
    return pa.table({"row_id": pa.array(ids, pa.string()), "prompt_tokens": tokens, "completion_tokens": tokens})


def who(make_job: MakeJob, **changes: Any) -> dict[str, Any]:
    job = make_job(**changes)
    return identity(job, plan_shards(at(job.input.path), shard_rows=job.shard_rows, check=prompt_of(job).check))


def test_an_attempt_is_written_with_its_digest(tmp_path: Path) -> None:
    output = OutputFolder(at(tmp_path / "out"))
    output.claim({})
    record = output.commit(3, "a/f.parquet#10", results("r", "s"), results("q"), begun_at=1.0)
    assert (record.shard, record.input_file, record.first_row, record.rows) == (3, "a/f.parquet", 10, 3)
    assert (record.quarantined, record.prompt_tokens, record.completion_tokens) == (1, 4, 4)
    assert set(output.done()) == {3}
    assert output.record(3) == record
    assert output.record(4) is None
    for written in (record.part, record.quarantine):
        assert written is not None
        data = (tmp_path / "out" / written.path).read_bytes()
        assert (written.bytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert pq.read_table(pa.BufferReader(data)).num_rows == written.rows


def test_files_without_rows_are_not_written(tmp_path: Path) -> None:
    output = OutputFolder(at(tmp_path))
    output.claim({})
    assert output.commit(0, "f#0", results("r"), results(), begun_at=1.0).quarantine is None
    assert output.commit(1, "f#1", results(), results("q"), begun_at=1.0).part is None
    assert len(list(tmp_path.rglob("*.parquet"))) == 2


def test_very_large_cells_have_no_statistics(tmp_path: Path) -> None:
    output = OutputFolder(at(tmp_path))
    output.claim({})
    for shard, cell in enumerate(("x", "x" * (SHARD_BYTES + 1))):
        table = pa.table({"cell": [cell]})
        for name, column in zip(results("r").schema.names, results("r").columns, strict=True):
            table = table.append_column(name, column)
        part = output.commit(shard, f"f#{shard}", table, results(), begun_at=1.0).part
        assert part is not None
        found = pq.read_metadata(tmp_path / part.path).row_group(0).column(0)
        assert found.is_stats_set == (len(cell) == 1)


def test_the_first_attempt_counts_and_the_rest_is_cleaned_up(tmp_path: Path) -> None:
    output = OutputFolder(at(tmp_path))
    output.claim({})
    first = output.commit(0, "f#0", results("r"), results(), begun_at=1.0)
    assert output.commit(0, "f#0", results("r"), results("q"), begun_at=1.0) == first
    assert len(list(tmp_path.rglob("part-*.parquet"))) == 3
    output.finish({"job": {}}, {"rows": 1})
    assert first.part is not None
    assert [path.name for path in tmp_path.rglob("part-*.parquet")] == [first.part.path]
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest["totals"] == {"rows": 1}
    assert [shard["part"]["path"] for shard in manifest["shards"]] == [first.part.path]
    assert output.finished({})


def test_an_output_belongs_to_one_job_and_input(tmp_path: Path, corpus: Path, make_job: MakeJob) -> None:
    output = OutputFolder(at(tmp_path / "out"))
    mine = who(make_job)
    assert not output.finished(mine)
    output.claim(mine)
    output.claim(who(make_job, name="renamed", engine="dedicated", max_quarantined_fraction=0.5, rows_in_flight=1))
    with pytest.raises(SettingsError, match=r"another job or input.*\(sampling.max_tokens: was None, is 8\)"):
        output.finished(who(make_job, sampling={"max_tokens": 8}))
    write_texts(corpus / "b.parquet", ["x"] * 7)
    with pytest.raises(SettingsError, match="the input's files differ"):
        output.finished(who(make_job))
    write_texts(corpus / "c.parquet", ["x"])
    with pytest.raises(SettingsError, match=r"input.files: was 2, is 3; input.rows: was 12, is 13"):
        output.claim(who(make_job))


def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(SettingsError, match=r"holds files that no job of hycluster wrote \('thesis.doc'\)"):
        OutputFolder(at(tmp_path)).finished({})
    with pytest.raises(SettingsError, match="is a file; must be a folder"):
        OutputFolder(at(tmp_path / "thesis.doc")).finished({})
    with pytest.raises(SettingsError, match=r"^output.path: .* can't be written"):
        OutputFolder(at(tmp_path / "thesis.doc" / "below")).claim({})


@pytest.mark.parametrize("flag", [0, os.ST_RDONLY])
def test_a_folder_that_cannot_be_written_is_told_before_there_are_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    """Root may write anywhere but on what is mounted read-only, and no test can mount."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flag))
    why = "Read-only file system" if flag else "Permission denied"
    with pytest.raises(SettingsError, match=rf"^output.path: '.*/a/b' can't be written: .*{why}: '{tmp_path}'$"):
        OutputFolder(at(tmp_path / "a" / "b")).check_store()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_claim_is_named(tmp_path: Path) -> None:
    (tmp_path / "_job.json").write_text("{")
    with pytest.raises(SettingsError, match=r"^output.path: .* can't be used"):
        OutputFolder(at(tmp_path)).finished({})


def test_an_output_inside_the_input_is_noticed(corpus: Path, make_job: MakeJob) -> None:
    whole = plan_shards(at(corpus), shard_rows=1, check=lambda schema, where: None)
    assert OutputFolder(at(corpus / "out")).is_input(whole)
    assert OutputFolder(at(corpus)).is_input(whole)
    assert not OutputFolder(at(f"{corpus}-out")).is_input(whole)
    assert not OutputFolder(at(corpus / "_out")).is_input(whole)
    for some in ("b.parquet", "*.parquet"):
        beside = plan_shards(at(corpus / some), shard_rows=1, check=lambda schema, where: None)
        assert not OutputFolder(at(corpus / "out")).is_input(beside)


def test_two_runs_at_once_keep_every_shard_once(tmp_path: Path) -> None:
    runs = [OutputFolder(at(tmp_path / "out")) for _ in range(2)]
    for run in runs:
        run.claim({"job": {}})

    def commit_all(run: OutputFolder) -> list[ShardRecord]:
        return [run.commit(n, f"f#{n}", results(f"f#{n}"), results(), begun_at=1.0) for n in range(40)]

    with ThreadPoolExecutor(2) as both:
        first, second = both.map(commit_all, runs)
    assert first == second
    for run in runs:
        run.finish({"job": {}}, {"rows": 40})
        shards = json.loads((tmp_path / "out" / "_manifest.json").read_text())["shards"]
        assert [shard["part"] for shard in shards] == [asdict(record.part) for record in first if record.part]
        assert len(list((tmp_path / "out").glob("part-*"))) == 40


def test_another_job_takes_over_a_cleared_output(tmp_path: Path, make_job: MakeJob) -> None:
    old, new = OutputFolder(at(tmp_path / "out")), OutputFolder(at(tmp_path / "out"))
    before, after = who(make_job), who(make_job, sampling={"max_tokens": 8})
    old.claim(before)
    old.commit(0, "f#0", results("old"), results("old"), begun_at=1.0)
    old.finish(before, {"rows": 2})
    notes = tmp_path / "out" / "_quarantine" / "notes.txt"
    notes.write_text("mine")
    assert not new.foreign(before)
    assert new.foreign(after)
    new.clear(after)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == ["_job.json", "notes.txt"]
    assert not new.claim(after)
    # A process of the old job that has not heard of it yet.
    late = old.commit(1, "f#1", results("old"), results(), begun_at=1.0)
    assert not new.done()
    mine = new.commit(1, "f#1", results("new"), results(), begun_at=1.0)
    assert list(new.records()) == [mine]
    new.finish(after, {"rows": 1})
    assert late.part is not None
    assert mine.part is not None
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == [mine.part.path]
    assert len(list((tmp_path / "out" / "_shards").iterdir())) == 1
    with pytest.raises(SettingsError, match="holds the output of another job or input; give another folder or --over"):
        old.finished(before)


@pytest.mark.parametrize("content", ["", "{}", '{"shard": 0, "par'])
def test_a_damaged_record_stops_the_job_and_says_what_to_do(tmp_path: Path, content: str) -> None:
    output = OutputFolder(at(tmp_path))
    output.claim({})
    output.commit(0, "f#0", results("r"), results(), begun_at=1.0)
    (record,) = (tmp_path / "_shards").iterdir()
    record.write_text(content)
    with pytest.raises(JobFailed, match=rf"_shards/{record.name} is damaged .*; delete it and run the same command"):
        output.record(0)
    record.unlink()
    assert output.record(0) is None
    assert set(output.done()) == set()
