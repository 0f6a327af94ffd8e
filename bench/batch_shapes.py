"""What a job of inputs of odd shapes takes of memory: thousands of tiny files, a row group of 2 GB, cells of 50 MB.

    python -m bench.batch_shapes --shapes tiny half group cells page

The job is that of ``bench.batch_scale``: real from plan to ``_SUCCESS``, with Ray Data, over an engine that answers at
once; then ``batch verify``. Shown is the largest process of each kind at its peak: the driver or verifier by the
kernel's count, the processes that Ray starts (which read, and which ask) by samples ten times a second, without the
pages of Ray's object store, through which they hand rows on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench.batch_scale import MIB, job, own_mib, watched

# What Ray calls the processes in which a job's rows are read, and asked and written.
READS, ASKS = "ReadCorpus", "MapWorker"
WORDS = np.random.default_rng(0).integers(97, 123, 64 * MIB, dtype=np.uint8).tobytes().decode()


def text(size: int, place: int) -> str:
    """Letters without any order, so that nothing packs them to a tenth; 63 MiB at most."""
    begin = place % MIB
    return WORDS[begin : begin + size]


def tiny(folder: Path) -> int:
    """5,000 files of 3 rows."""
    for number in range(5000):
        table = pa.table({"id": [0, 1, 2], "text": [f"file {number} row {row}" for row in range(3)]})
        pq.write_table(table, folder / f"{number:05d}.parquet")
    return 15_000


def group(folder: Path, rows: int = 40_000) -> int:
    """One row group of 2 GB: 40,000 texts of 50 KB, uncompressed."""
    size = 50_000
    texts = pa.chunked_array([pa.array([text(size, row * 7919 + n) for n in range(500)]) for row in range(rows // 500)])
    table = pa.table({"id": pa.array(range(rows), pa.int64()), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=rows, compression="none", use_dictionary=False)
    return rows


def half(folder: Path) -> int:
    """One of 1 GB: what is bounded is the same."""
    return group(folder, 20_000)


def cells(folder: Path) -> int:
    """24 cells of 50 MB that no prompt takes, in a column beside the texts; a row group each."""
    schema = pa.schema([("text", pa.string()), ("cell", pa.binary())])
    with pq.ParquetWriter(folder / "a.parquet", schema, use_dictionary=False, compression="none") as writer:
        for row in range(24):
            cell = text(50_000_000, row).encode()
            writer.write_table(pa.table({"text": [f"row {row}"], "cell": pa.array([cell], pa.binary())}, schema))
    return 24


def page(folder: Path) -> int:
    """One page of 400 MB: 8,000 texts of 50 KB that a writer did not cut."""
    rows, size = 8000, 50_000
    table = pa.table({"text": [text(size, row * 7919) for row in range(rows)]})
    pq.write_table(
        table, folder / "a.parquet", row_group_size=rows, compression="none", use_dictionary=False,
        data_page_size=1 << 30, write_batch_size=rows,
    )  # fmt: skip
    return rows


SHAPES: dict[str, Callable[[Path], int]] = {"tiny": tiny, "half": half, "group": group, "cells": cells, "page": page}


@contextmanager
def sampled(peaks: dict[str, float]) -> Iterator[None]:
    """By the title of Ray's worker processes below this one, the largest one's peak in MiB."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::"):
                        name = title.removeprefix("ray::").replace("(", " ").split()[0]
                        peaks[name] = max(peaks[name], own_mib(str(process.pid)))
                except (psutil.Error, OSError, IndexError):
                    continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def measure(shape: str, folder: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        work = Path(name)
        (work / "corpus").mkdir()
        rows = SHAPES[shape](work / "corpus")
        settings: dict[str, Any] = job(work, 256)
        (work / "job.json").write_text(json.dumps(settings))
        size = sum(file.stat().st_size for file in (work / "corpus").iterdir()) / 1e6
        print(f"{shape}: {rows} rows, {size:.0f} MB of Parquet", flush=True)
        for command in ("run", "verify"):
            peaks: dict[str, float] = defaultdict(float)
            with sampled(peaks):
                found = watched(command, work)
            workers = ", ".join(f"{name} {peaks[name]:.0f}" for name in (READS, ASKS) if name in peaks)
            print(f"  {command}: {found['s']:.1f} s, peak {found['peak_mib']:.0f} MiB; {workers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where to work; some 8 GB of disk are needed")
    args = parser.parse_args()
    for shape in args.shapes:
        measure(shape, args.folder)


if __name__ == "__main__":
    main()
