"""The output folder as others read it: the parts, and nothing else that lies beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets  # type: ignore[import-untyped]
import duckdb
import pandas  # type: ignore[import-untyped] # noqa: ICN001 - as the report writes it
import polars  # noqa: ICN001 - as the report writes it
import pyarrow as pa
import pyarrow.dataset
import pytest

from hycluster.batch.job import Job
from hycluster.batch.progress.figures import write_report
from hycluster.batch.progress.page import reader_lines
from tests.batch.committed import commit_all
from tests.batch.conftest import write_texts
from tests.located import at

# The lines that the report shows are run as they are.
READERS = {"datasets": datasets, "duckdb": duckdb, "pandas": pandas, "polars": polars, "pyarrow": pyarrow}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 rows in the parts, one in the quarantine, all files that a job leaves; its name is to be taken as it is."""
    folder = tmp_path_factory.mktemp("readers")
    write_texts(folder / "in" / "a.parquet", [f"text {n}" for n in range(12)])
    write_texts(folder / "in" / "b.parquet", ["fine", None])
    return commit_all(job(folder / "in", folder / "what I've [got]"))


def job(corpus: Path, output: Path) -> Job:
    columns = {"path": str(corpus), "columns": {"text": "text"}}
    settings = {"name": "test", "model": "m", "task": "generate", "shard_rows": 2, "input": columns}
    return Job.model_validate({**settings, "output": {"path": str(output)}})


@pytest.fixture
def out(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_report(at(written))
    return written


@pytest.mark.parametrize("who", sorted({*reader_lines("")} - {"Spark"}))
def test_the_lines_that_the_report_shows_read_the_parts(out: Path, who: str) -> None:
    line = reader_lines(str(out))[who]
    found = eval(line, dict(READERS))
    if who == "datasets":
        found = found["train"]
    elif who == "pyarrow":
        found = found.to_table()
    # Only what was read with its columns counts: DuckDB counts rows of files whose columns it then refuses.
    texts, outputs = (list(map(str, _column(found, name))) for name in ("text", "output"))
    assert sorted(outputs) == sorted(text.upper() for text in texts)
    assert len(outputs) == 13


def _column(found: object, name: str) -> list[object]:
    if isinstance(found, duckdb.DuckDBPyRelation):
        return [row[0] for row in found.select(name).fetchall()]
    if isinstance(found, pa.Table):
        return list(found.column(name).to_pylist())
    return list(found[name])  # type: ignore[index]


def test_the_report_shows_them_once_there_is_a_result(out: Path, tmp_path: Path) -> None:
    page = (out / "_report.html").read_text()
    assert f"pandas.read_parquet(&#34;{str(out).replace(chr(39), '&#39;')}&#34;)" in page
    begun = commit_all(job(out.parent / "in", tmp_path / "begun"), first=2, finish=False)
    write_report(at(begun))
    assert "pandas" not in (begun / "_report.html").read_text()


def test_datasets_reads_the_folder(out: Path, tmp_path: Path) -> None:
    # A folder by itself is a pattern to these two.
    out = shutil.copytree(out, tmp_path / "out")
    read = datasets.load_dataset(str(out))
    assert read["train"].num_rows == 13
    # Without a word of ours it takes the JSON files for the rows.
    copy = tmp_path / "copy"
    shutil.copytree(out, copy, ignore=shutil.ignore_patterns(".huggingface.yaml"))
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.load_dataset(str(copy))


def test_who_reads_no_such_folder_says_so(out: Path, tmp_path: Path) -> None:
    """If this fails, the docs can be told: they read it as it is."""
    out = shutil.copytree(out, tmp_path / "out")
    with pytest.raises(polars.exceptions.InvalidOperationError, match="different file extensions"):
        polars.read_parquet(out)
    with pytest.raises(duckdb.Error, match="_quarantine"):
        duckdb.read_parquet(str(out)).fetchall()
