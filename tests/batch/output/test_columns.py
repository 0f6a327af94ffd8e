"""Columns of the input that are named as the output's: kept as they are, and a job's output is the next one's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.verify import verify_output
from hycluster.batch.progress.figures import write_report
from hycluster.errors import SettingsError
from tests.batch.committed import commit_all, forge, parts
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in parts(out) for row in pq.read_table(path).to_pylist()]


def test_the_commonest_layout_of_training_data(make_job: MakeJob, tmp_path: Path) -> None:
    table = pa.table({"instruction": ["sum up", None], "text": ["a b", None], "output": ["gold", "more"]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    job = make_job(input={"path": str(tmp_path / "in"), "columns": {"text": "text"}})
    out = commit_all(job)
    assert verify_output(at(out), at(tmp_path / "in")).faults == []
    assert rows_of(out) == [
        {
            "instruction": "sum up",
            "text": "a b",
            "output": "gold",
            "row_id_2": "a.parquet#0",
            "output_2": "A B",
            "finish_reason_2": "stop",
            "prompt_tokens_2": 3,
            "completion_tokens_2": 2,
        }
    ]
    (refused,) = (out / "_quarantine").glob("*.parquet")
    assert pq.read_table(refused).column("error_type_2").to_pylist() == ["NullValue"]
    report = write_report(at(out))
    assert (report["finish_reasons"], report["quarantine_reasons"]) == ({"stop": 1}, {"NullValue": 1})
    assert report["samples"][0]["output_2"] == "A B"
    part = pq.read_table(parts(out)[0])
    forge(out, 0, part.set_column(2, "output", pa.array(["other"])))
    assert "column 'output' is not the input's" in verify_output(at(out), at(tmp_path / "in")).faults[0]
    forge(out, 0, part.set_column(6, "prompt_tokens_2", pa.array([9])))
    assert "column 'prompt_tokens_2' adds up to 9" in verify_output(at(out), at(tmp_path / "in")).faults[0]


def row_of(folder: Path, row_id: str) -> dict[str, Any]:
    """The row that an id names in the input that it is relative to."""
    path, _, number = row_id.rpartition("#")
    row: dict[str, Any] = pq.read_table(folder / path).to_pylist()[int(number)]
    return row


def test_the_output_of_a_job_is_the_input_of_the_next(make_job: MakeJob, tmp_path: Path, corpus: Path) -> None:
    # One row is lost on the way: it is in the first job's quarantine, which is no input.
    write_texts(corpus / "c.parquet", ["last but one", None, "last"])
    inputs = [corpus]
    for number, column in enumerate(("text", "output", "output_2")):
        out = tmp_path / f"out{number}"
        changes = {"input": {"path": str(inputs[-1]), "columns": {"text": column}}, "output": {"path": str(out)}}
        commit_all(make_job(**changes))
        assert verify_output(at(out), at(inputs[-1])).faults == []
        inputs.append(out)
    rows = rows_of(out)
    assert [row["text"] for row in rows] == [row["text"] for row in rows_of(inputs[1])]
    assert len(rows) == 14
    assert [rows[0][name] for name in ("text", "output", "output_2", "output_3")] == ["deep 0", *["DEEP 0"] * 3]
    assert OutputFolder(at(out)).suffix() == "_3"
    # Each row's way back to where it came from, job by job, with all that it was there.
    for row in rows:
        for folder, row_id in zip(inputs, ("row_id", "row_id_2", "row_id_3"), strict=False):
            before = row_of(folder, row[row_id])
            assert before == {name: row[name] for name in before}
    # A change in the middle is a change of the last one's input, and the proof of the last one says so.
    parts(inputs[2])[3].unlink()
    assert "is not what the job ran on" in verify_output(at(out), at(inputs[2])).faults[0]


def test_a_suffix_of_ones_own(make_job: MakeJob, tmp_path: Path, corpus: Path) -> None:
    out = commit_all(make_job(output={"path": str(tmp_path / "out"), "columns_suffix": "_de"}))
    assert verify_output(at(out), at(corpus)).faults == []
    assert rows_of(out)[0]["output_de"] == "DEEP 0"
    pq.write_table(pa.table({"text": ["a"], "row_id_de": [1]}), corpus / "c.parquet")
    with pytest.raises(
        SettingsError, match=r"^output.columns_suffix: '_de': the input has a column 'row_id_de' already"
    ):
        commit_all(make_job(output={"path": str(tmp_path / "other"), "columns_suffix": "_de"}))


def test_a_kept_tree_needs_a_name_too(make_job: MakeJob, tmp_path: Path, corpus: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "tree": ["oak"]}), corpus / "c.parquet")
    for keep, suffix in ((False, ""), (True, "_2")):
        path = str(tmp_path / f"out{keep}")
        job = make_job(task="summarize", summary={"keep_tree": keep}, output={"path": path})
        assert OutputFolder(at(commit_all(job))).suffix() == suffix
