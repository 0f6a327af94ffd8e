"""The output folder as others read it: the parts, and nothing else that lies beside them."""

from __future__ import annotations

from pathlib import Path

import datasets  # type: ignore[import-untyped]
import duckdb
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow.dataset as ds
import pytest

from hycluster.batch.progress.figures import write_report
from tests.batch.committed import commit_all
from tests.batch.conftest import MakeJob, write_texts
from tests.located import at


@pytest.fixture
def out(make_job: MakeJob, corpus: Path) -> Path:
    """13 rows in the parts, one in the quarantine, and all files that a job leaves."""
    write_texts(corpus / "c.parquet", ["fine", None])
    out = commit_all(make_job())
    write_report(at(out))
    return out


def test_pandas_and_pyarrow_read_the_folder(out: Path) -> None:
    frame = pd.read_parquet(out)
    assert list(frame["output"]) == [text.upper() for text in frame["text"]]
    assert len(frame) == ds.dataset(out).count_rows() == 13


def test_polars_reads_the_pattern(out: Path) -> None:
    assert pl.read_parquet(out / "*.parquet").height == 13


def test_duckdb_reads_the_pattern(out: Path) -> None:
    assert duckdb.read_parquet(f"{out}/*.parquet").shape[0] == 13


def test_datasets_reads_the_pattern(out: Path, tmp_path: Path) -> None:
    read = datasets.load_dataset("parquet", data_files=f"{out}/*.parquet", cache_dir=str(tmp_path / "cache"))
    assert read["train"].num_rows == 13
