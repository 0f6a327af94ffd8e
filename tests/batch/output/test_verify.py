from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hycluster.batch.output import verify as verify_module
from hycluster.batch.output.verify import verify_output
from hycluster.batch.progress.figures import write_report
from hycluster.batch.progress.status import Watcher
from hycluster.errors import SettingsError
from tests.batch.committed import commit_all, forge, parts, record_file
from tests.batch.conftest import MakeJob, broken_utf8, damage, write_texts
from tests.located import at
from tests.object_store import BUCKET, ObjectStore


@pytest.fixture
def out(make_job: MakeJob, corpus: Path) -> Path:
    """15 rows in 9 shards, one row quarantined."""
    write_texts(corpus / "c.parquet", ["fine", None, "last"])
    return commit_all(make_job())


def only(out: Path, corpus: Path) -> str:
    """The one fault that there is."""
    verdict = verify_output(at(out), at(corpus))
    assert verdict.fault_count == 1, verdict.faults
    assert verdict.lines() == verdict.faults
    return verdict.faults[0]


def faults(out: Path, corpus: Path) -> str:
    return "\n".join(verify_output(at(out), at(corpus)).faults)


def test_a_right_output_is_one_line(out: Path, corpus: Path) -> None:
    verdict = verify_output(at(out), at(corpus))
    written = sum(path.stat().st_size for path in out.rglob("part-*.parquet"))
    assert verdict.lines() == [
        f"verified: 15 rows, each exactly once: 14 in the output, 1 in the quarantine (9 shards, {written} bytes)"
    ]


def test_columns_of_every_kind_are_compared(make_job: MakeJob, corpus: Path) -> None:
    words = pa.array(["x", None, "y", "x"]).dictionary_encode()
    table = pa.table(
        {
            "text": pa.array(["a", "b", "c", None], pa.large_string()),
            "price": [float("nan"), None, -0.0, 1.5],
            "nested": [{"k": 1.5, "v": [b"\xff"]}, None, {"k": float("nan"), "v": []}, None],
            "when": pa.array([0, None, 1, 2], pa.timestamp("ms", tz="UTC")),
            "kind": words,
            "broken": broken_utf8([b"\xff", b"fine", b"\xc3", b""]),
        }
    )
    pq.write_table(table, corpus / "c.parquet")
    job = make_job(shard_rows=3)
    out = commit_all(job)
    assert verify_output(at(out), at(corpus)).fault_count == 0
    part = pq.read_table(parts(out)[-1])
    for name, other in (
        ("price", pa.array([float("nan"), 0.0, -0.0])),
        ("nested", pa.array([None, None, None], table.schema.field("nested").type)),
        ("kind", pa.array(["y", None, "y"]).dictionary_encode()),
        ("broken", pa.array(["", "fine", ""])),
    ):
        index = part.schema.names.index(name)
        forge(out, 5, part.set_column(index, name, other))
        assert f"column {name!r} is not the input's" in only(out, corpus)
    forge(out, 5, part)
    assert verify_output(at(out), at(corpus)).fault_count == 0


def test_a_deleted_row(out: Path, corpus: Path) -> None:
    forge(out, 0, pq.read_table(parts(out)[0]).slice(1))
    assert "shard 0: 1 rows missing: a/z.parquet#0" in faults(out, corpus)


def test_a_doubled_row(out: Path, corpus: Path) -> None:
    part = pq.read_table(parts(out)[3])
    forge(out, 3, pa.concat_tables([part, part.slice(1)]))
    assert "shard 3: 1 rows doubled: b.parquet#1" in faults(out, corpus)


def test_a_row_in_the_output_and_in_the_quarantine(out: Path, corpus: Path) -> None:
    part = pq.read_table(parts(out)[7])
    (quarantine,) = (out / "_quarantine").glob("*.parquet")
    refused = pq.read_table(quarantine)
    extra = pa.table({name: (refused if name in refused.schema.names else part)[name] for name in part.schema.names})
    forge(out, 7, pa.concat_tables([part, extra.cast(part.schema)]))
    assert "shard 7: 1 rows doubled: c.parquet#1" in faults(out, corpus)


def test_rows_out_of_order_and_rows_of_another_shard(out: Path, corpus: Path) -> None:
    part = pq.read_table(parts(out)[3])
    forge(out, 3, part.take([1, 0]))
    assert only(out, corpus).endswith("its rows are not in input order")
    forge(out, 3, pq.read_table(parts(out)[4]))
    said = faults(out, corpus)
    assert "2 rows are not of this shard: 'b.parquet#2', 'b.parquet#3'" in said
    assert "shard 3: 2 rows missing: b.parquet#0, b.parquet#1" in said


def test_a_changed_byte(out: Path, corpus: Path) -> None:
    path = parts(out)[2]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert f"shard 2: {path.name}: its sha256 is not the manifest's" in faults(out, corpus)


def test_a_missing_and_a_short_file(out: Path, corpus: Path) -> None:
    first, second = parts(out)[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    said = faults(out, corpus)
    assert f"shard 0: {first.name}: is missing" in said
    assert "shard 0: 2 rows missing: a/z.parquet#0, a/z.parquet#1" in said
    assert f"shard 1: {second.name}: has" in said
    assert f"shard 1: {second.name}: is not a readable Parquet file" in said


def test_swapped_files(out: Path, corpus: Path) -> None:
    first, second = parts(out)[3:5]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    said = faults(out, corpus)
    for number in (3, 4):
        assert f"shard {number}: 2 rows missing" in said


def test_a_changed_value_whose_sha256_was_made_right_again(out: Path, corpus: Path) -> None:
    part = pq.read_table(parts(out)[3])
    index = part.schema.names.index("id")
    forge(out, 3, part.set_column(index, "id", pc.add(part["id"], pa.scalar(1, pa.int32()))))
    assert only(out, corpus).endswith("column 'id' is not the input's")


def test_a_changed_type_a_lost_column_and_changed_tokens(out: Path, corpus: Path) -> None:
    part = pq.read_table(parts(out)[3])
    forge(out, 3, part.set_column(0, "id", part["id"].cast(pa.int64())))
    assert only(out, corpus).endswith("column 'id' is not the input's")
    forge(out, 3, part.drop_columns(["id"]))
    assert "they must begin with the input's, ['id', 'text']" in only(out, corpus)
    forge(out, 3, part.drop_columns(["output"]))
    assert only(out, corpus).endswith("must have one column 'output'")
    index = part.schema.names.index("completion_tokens")
    forge(out, 3, part.set_column(index, "completion_tokens", pa.array([2, 3])))
    assert only(out, corpus).endswith("column 'completion_tokens' adds up to 5; the manifest says 4")


def test_an_input_that_changed(out: Path, corpus: Path) -> None:
    table = pq.read_table(corpus / "b.parquet")
    changed = table.set_column(1, "text", pa.array([f"texT {n}" for n in range(7)], pa.large_string()))
    size = (corpus / "b.parquet").stat().st_size
    pq.write_table(changed, corpus / "b.parquet")
    assert (corpus / "b.parquet").stat().st_size == size, "the change must be one that no footer tells"
    assert "column 'text' is not the input's" in faults(out, corpus)
    write_texts(corpus / "b.parquet", [f"other {n}" for n in range(7)])
    assert only(out, corpus) == f"input: {str(corpus)!r} is not what the job ran on"
    write_texts(corpus / "b.parquet", ["fewer"])
    assert "is not what the job ran on: rows was 15, is 9" in only(out, corpus)


def test_rows_that_cannot_be_read_must_be_in_the_quarantine(make_job: MakeJob, corpus: Path) -> None:
    write_texts(corpus / "c.parquet", [f"text {n} " + "x" * n for n in range(6)], row_group_size=2)
    damage(corpus / "c.parquet", 1, 1)
    (corpus / "d.parquet").write_bytes(b"not Parquet")
    out = commit_all(make_job())
    assert faults(out, corpus) == ""
    record = json.loads(record_file(out, 8).read_text())
    refused = pq.read_table(out / record["quarantine"]["path"])
    assert refused.column("row_id").to_pylist() == ["c.parquet#2", "c.parquet#3"]
    columns = {
        "output": ["a", "b"],
        "finish_reason": ["stop"] * 2,
        "prompt_tokens": [0, 0],
        "completion_tokens": [0, 0],
    }
    answered = refused.select(["id", "text", "row_id"])
    for name, values in columns.items():
        answered = answered.append_column(name, pa.array(values))
    pq.write_table(answered, out / "part-00000008-made-up.parquet")
    data = (out / "part-00000008-made-up.parquet").read_bytes()
    written = {"path": "part-00000008-made-up.parquet", "rows": 2, "bytes": len(data)}
    record |= {"part": {**written, "sha256": hashlib.sha256(data).hexdigest()}, "quarantine": None}
    record_file(out, 8).write_text(json.dumps(record))
    manifest = json.loads((out / "_manifest.json").read_text())
    manifest["shards"][8] = record
    (out / "_manifest.json").write_text(json.dumps(manifest))
    said = faults(out, corpus)
    assert "2 rows that can't be read have a result: c.parquet#2, c.parquet#3" in said


def test_an_unfinished_job(make_job: MakeJob, corpus: Path) -> None:
    out = commit_all(make_job(), first=3, finish=False)
    assert only(out, corpus) == "_SUCCESS: is missing: the job has not finished; its own command resumes it"


def test_files_that_nobody_names(out: Path, corpus: Path) -> None:
    shutil.copy(parts(out)[0], out / "part-00000000-again.parquet")
    assert only(out, corpus).startswith("part-00000000-again.parquet: is not in the manifest")
    (out / "part-00000000-again.parquet").rename(out / "_quarantine" / "part-x.parquet")
    assert only(out, corpus).startswith("_quarantine/part-x.parquet: is not in the manifest")
    (out / "_quarantine" / "part-x.parquet").rename(out / "notes.txt")
    assert verify_output(at(out), at(corpus)).fault_count == 0


def test_an_output_on_an_object_store(make_job: MakeJob, corpus: Path, store: ObjectStore) -> None:
    job = make_job(output={"path": store.uri("verified")})
    commit_all(job)
    assert verify_output(at(job.output.path), at(corpus)).faults == []
    report = write_report(at(job.output.path))
    assert report["output"] == f"s3://{BUCKET}/verified"
    assert "secret" not in json.dumps(report)
    status = Watcher(at(job.output.path)).look()
    assert (status.finished, status.output, status.done.rows) == (True, f"{BUCKET}/verified", 12)
    folder = at(job.output.path)
    assert {"_report.html", "_report.json"} < set(folder.names())
    folder.delete([next(n for n in sorted(folder.names()) if n.startswith("part-"))])
    assert verify_output(at(job.output.path), at(corpus)).fault_count == 2


def drop_shard(out: Path) -> None:
    manifest = json.loads((out / "_manifest.json").read_text())
    del manifest["shards"][4]
    (out / "_manifest.json").write_text(json.dumps(manifest))


def double_shard(out: Path) -> None:
    lines = (out / "_manifest.json").read_text().splitlines()
    (out / "_manifest.json").write_text("\n".join([*lines[:5], lines[4], *lines[5:]]))


def change_totals(out: Path) -> None:
    text = (out / "_manifest.json").read_text()
    (out / "_manifest.json").write_text(text.replace('"quarantined": 1', '"quarantined": 0'))


def tear_manifest(out: Path) -> None:
    text = (out / "_manifest.json").read_text()
    (out / "_manifest.json").write_text(text[: len(text) // 2])


def change_record(out: Path) -> None:
    path = record_file(out, 4)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "rows": 1}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (drop_shard, "shard 4: is not in the manifest"),
        (double_shard, "_manifest.json: shard 3 is there twice"),
        (change_totals, "_manifest.json: totals are {'rows': 15, 'quarantined': 0"),
        (tear_manifest, "_manifest.json: can't be read"),
        (lambda out: (out / "_manifest.json").unlink(), "_manifest.json: is missing"),
        (lambda out: (out / "_manifest.json").write_text("[]"), "_manifest.json: can't be read: TypeError"),
        (change_record, "shard 4: its record in _shards says otherwise than the manifest"),
        (lambda out: record_file(out, 4).unlink(), "shard 4: has no record in _shards"),
        (lambda out: record_file(out, 4).write_text("{"), "shard 4: its record in _shards can't be"),
        (lambda out: (out / "_job.json").unlink(), "_job.json: is missing or unreadable"),
        (lambda out: (out / "_job.json").write_text("{}"), "_job.json: can't be understood"),
    ],
)
def test_books_that_do_not_add_up(out: Path, corpus: Path, harm: Callable[[Path], object], said: str) -> None:
    harm(out)
    assert said in faults(out, corpus)


def test_many_faults_are_counted(out: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "MOST_FAULTS", 3)
    for path in parts(out):
        path.unlink()
    verdict = verify_output(at(out), at(corpus))
    assert len(verdict.lines()) == 4
    assert verdict.lines()[-1] == f"and {verdict.fault_count - 3} more"


def test_where_no_job_was_and_where_no_input_is(tmp_path: Path, out: Path) -> None:
    with pytest.raises(SettingsError, match=r"^OUTPUT: '.*' holds no output of a job"):
        verify_output(at(tmp_path / "nowhere"), at(tmp_path))
    with pytest.raises(SettingsError, match=r"^input.path: '.*nowhere': no such file"):
        verify_output(at(out), at(tmp_path / "nowhere"))
