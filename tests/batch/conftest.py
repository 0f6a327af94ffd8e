"""One small Ray cluster for all batch tests, and texts in Parquet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hycluster.batch.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    import ray
    from ray import cloudpickle

    from tests.batch import stand_in

    # Ray's worker processes do not have the tests on their path.
    cloudpickle.register_pickle_by_value(stand_in)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(stand_in)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files, 7 + 5 rows, one of them in a folder."""
    folder = tmp_path / "corpus"
    write_texts(folder / "b.parquet", [f"text {n}" for n in range(7)])
    write_texts(folder / "a" / "z.parquet", [f"deep {n}" for n in range(5)])
    return folder


@pytest.fixture
def make_job(tmp_path: Path, corpus: Path) -> MakeJob:
    def make(**changes: Any) -> Job:
        settings = {
            "name": "test",
            "model": "stand-in",
            "task": "generate",
            "input": {"path": str(corpus), "columns": {"text": "text"}},
            "output": {"path": str(tmp_path / "out")},
            "shard_rows": 2,
            "retry_s": 0,
            "max_quarantined_fraction": 0,
        }
        return Job.model_validate({**settings, **changes})

    return make


def write_texts(path: Path, texts: Sequence[str | None], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": pa.array(range(len(texts)), pa.int32()), "text": pa.array(texts, pa.large_string())})
    pq.write_table(table, path, **options)


def broken_utf8(texts: Sequence[bytes | None]) -> pa.Array:
    """A string column whose bytes are taken as they are."""
    binary = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


def damage(path: Path, group: int, column: int) -> None:
    """Turn bytes over in the middle of one column of one row group; the footer and the size stay."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(column)
    begin = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    middle = begin + chunk.total_compressed_size // 2
    data = bytearray(path.read_bytes())
    data[middle : middle + 40] = bytes(byte ^ 0xFF for byte in data[middle : middle + 40])
    path.write_bytes(data)
