"""What a job came to, in figures: ``_report.json``, and the data of ``_report.html``.

Read from the shards' records and from single columns of their files. In memory are counts, and a few numbers a
shard; not rows.
"""

from __future__ import annotations

import heapq
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.record import ShardRecord, Totals, Written
from hycluster.batch.progress.page import render_page
from hycluster.batch.progress.progress_file import last_word
from hycluster.errors import SettingsError
from hycluster.storage import Folder

REPORT_JSON, REPORT_HTML = "_report.json", "_report.html"
# Most bars of a plot.
TIMES = 120
LENGTHS = 40
SLOWEST = 10
# Rows that are shown, and how much of each value.
SAMPLES = 5
SAMPLE_CHARACTERS = 600
READERS = 16
# Shards whose files are read at once.
WINDOW = 256


class Spans:
    """When each shard was worked on and what came of it, 32 bytes a shard."""

    def __init__(self) -> None:
        self.begun_at, self.committed_at = array("d"), array("d")
        self.rows, self.completion_tokens = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, begun_at: float, committed_at: float, rows: int, completion_tokens: int) -> None:
        self.begun_at.append(begun_at)
        self.committed_at.append(committed_at)
        self.rows.append(rows)
        self.completion_tokens.append(completion_tokens)


@dataclass(frozen=True, slots=True, order=True)
class _Slow:
    seconds: float
    shard: int
    input_file: str
    first_row: int
    rows: int
    completion_tokens: int


class _Samples:
    """The first rows, by some of their columns."""

    def __init__(self, suffix: str, *columns: str) -> None:
        self._columns = [f"{name}{suffix}" for name in ("row_id", *columns)]
        self.rows: list[dict[str, Any]] = []

    def look(self, folder: Folder, written: Written | None) -> None:
        if written is None or len(self.rows) >= SAMPLES:
            return
        with folder.open_file(written.path) as handle, pq.ParquetFile(handle) as parquet:
            batch = next(parquet.iter_batches(SAMPLES - len(self.rows), columns=self._columns))
        self.rows += [
            {name: str(value)[:SAMPLE_CHARACTERS] for name, value in row.items()} for row in batch.to_pylist()
        ]


def write_report(folder: Folder) -> dict[str, Any]:
    """Write ``_report.json`` and ``_report.html`` into the output, of what is committed there.

    Returns:
        What ``_report.json`` holds; see ``figures``.

    Raises:
        SettingsError: there is no job's output in it.
        OSError: something of it can't be read or written.
    """
    job = folder.read_json("_job.json")
    if job is None:
        raise SettingsError(f"OUTPUT: {folder.masked!r} holds no output of a job (there is no _job.json)")
    # The path or URI without what a URI may carry along, such as keys.
    found = {"version": 1, "output": folder.writable().object_store()[0], "job": job["job"], "input": job["input"]}
    word = last_word(folder, str(job.get("edition", "")))
    found["ended"] = word.ended if word else None
    output = OutputFolder(folder)
    found |= figures(folder, output.records(), output.suffix())
    output.folder.replace(REPORT_JSON, json.dumps(found, indent=1).encode())
    output.folder.replace(REPORT_HTML, render_page(found).encode())
    return found


def figures(folder: Folder, records: Iterator[ShardRecord], suffix: str = "") -> dict[str, Any]:
    """Figures of the given shards.

    Args:
        suffix: what the names of the job's columns end with.

    Returns:
        ``totals`` and ``shards`` (how many); ``begun_at`` and ``committed_at`` of the first and the last, seconds
        since the epoch; ``busy_s``, the seconds in which any shard was worked on, and ``rows_per_s`` and
        ``tokens_per_s`` over these; ``throughput``, a list of times (``from_s`` after the beginning) with their
        rates; ``completion_tokens`` with percentiles and a histogram; ``finish_reasons`` and
        ``quarantine_reasons``, rows each; ``slowest_shards``; ``samples`` and ``quarantine_samples``, a few rows each.
    """
    totals = Totals()
    spans = Spans()
    slowest: list[_Slow] = []
    lengths: Counter[int] = Counter()
    finish_reasons: Counter[str] = Counter()
    quarantine_reasons: Counter[str] = Counter()
    samples = _Samples(suffix, "output", "finish_reason"), _Samples(suffix, "error_type", "error_message")
    with ThreadPoolExecutor(READERS) as readers:
        while some := list(islice(records, WINDOW)):
            for record in some:
                samples[0].look(folder, record.part)
                samples[1].look(folder, record.quarantine)
            for record, columns in zip(some, readers.map(partial(_columns, folder, suffix), some), strict=True):
                totals += Totals(record.rows, record.quarantined, record.prompt_tokens, record.completion_tokens)
                spans.add(record.begun_at, record.committed_at, record.rows, record.completion_tokens)
                slow = _Slow(
                    record.committed_at - record.begun_at,
                    record.shard,
                    record.input_file,
                    record.first_row,
                    record.rows,
                    record.completion_tokens,
                )
                (heapq.heappushpop if len(slowest) == SLOWEST else heapq.heappush)(slowest, slow)
                lengths += columns[0]
                finish_reasons += columns[1]
                quarantine_reasons += columns[2]
    busy = busy_s(spans)
    return {
        "totals": asdict(totals),
        "shards": len(spans),
        "begun_at": min(spans.begun_at, default=None),
        "committed_at": max(spans.committed_at, default=None),
        "busy_s": busy,
        "rows_per_s": totals.rows / busy if busy else None,
        "tokens_per_s": totals.completion_tokens / busy if busy else None,
        "throughput": throughput(spans),
        "completion_tokens": length_figures(lengths),
        "finish_reasons": dict(finish_reasons.most_common()),
        "quarantine_reasons": dict(quarantine_reasons.most_common()),
        "slowest_shards": [asdict(slow) for slow in sorted(slowest, reverse=True)],
        "samples": samples[0].rows,
        "quarantine_samples": samples[1].rows,
    }


def busy_s(spans: Spans) -> float:
    """Seconds in which at least one shard was in work: a job that was resumed after a night has no night in it."""
    begun_at, committed_at = np.asarray(spans.begun_at), np.asarray(spans.committed_at)
    order = np.argsort(begun_at)
    begun_at, until = begun_at[order], np.maximum.accumulate(committed_at[order])
    # What a shard adds is what is after all that began before it.
    from_s = np.maximum(begun_at, np.concatenate([begun_at[:1], until[:-1]]))
    return float(np.maximum(until - from_s, 0.0).sum())


def throughput(spans: Spans) -> list[dict[str, float]]:
    """Rates over time: each shard's rows and tokens spread evenly over the time that it was in work."""
    if not len(spans):
        return []
    begun_at, committed_at = np.asarray(spans.begun_at), np.asarray(spans.committed_at)
    begin = begun_at.min()
    width = float(committed_at.max() - begin) / TIMES
    if width <= 0:
        return []
    begun_s = begun_at - begin
    # Of no time at all, a shard would have no part in any.
    committed_s = np.maximum(committed_at - begin, begun_s + 1e-6)
    times = []
    for time in range(TIMES):
        inside = np.minimum(committed_s, (time + 1) * width) - np.maximum(begun_s, time * width)
        share = np.maximum(inside, 0.0) / (committed_s - begun_s) / width
        rows_per_s, tokens_per_s = float(share @ spans.rows), float(share @ spans.completion_tokens)
        times.append({"from_s": time * width, "rows_per_s": rows_per_s, "tokens_per_s": tokens_per_s})
    return times


def length_figures(lengths: Counter[int]) -> dict[str, Any]:
    """Percentiles and a histogram of completion tokens a row; a bin is ``from_tokens`` up to the next one's."""
    count = lengths.total()
    if not count:
        return {"p50": None, "p90": None, "p99": None, "max": None, "bins": []}
    width = max(lengths) // LENGTHS + 1
    bins = [0] * (max(lengths) // width + 1)
    for length, rows in lengths.items():
        bins[length // width] += rows
    wanted = {"p50": 0.5 * count, "p90": 0.9 * count, "p99": 0.99 * count}
    found: dict[str, Any] = {}
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        for name, rank in wanted.items():
            if seen >= rank:
                found.setdefault(name, length)
    found["max"] = max(lengths)
    found["bins"] = [{"from_tokens": number * width, "rows": rows} for number, rows in enumerate(bins)]
    return found


def _columns(folder: Folder, suffix: str, record: ShardRecord) -> tuple[Counter[int], Counter[str], Counter[str]]:
    """How often each output length, finish reason and quarantine reason occurs in one shard."""
    lengths, finish_reasons = _counts(folder, record.part, f"completion_tokens{suffix}", f"finish_reason{suffix}")
    (quarantine_reasons,) = _counts(folder, record.quarantine, f"error_type{suffix}")
    return lengths, finish_reasons, quarantine_reasons


def _counts(folder: Folder, written: Written | None, *columns: str) -> list[Counter[Any]]:
    if written is None:
        return [Counter() for _ in columns]
    with folder.open_file(written.path) as handle, pq.ParquetFile(handle) as parquet:
        table = parquet.read(columns=list(columns))
    return [
        Counter({"none" if value is None else value: number for value, number in _pairs(table, name)})
        for name in columns
    ]


def _pairs(table: Any, name: str) -> Iterator[tuple[Any, int]]:
    counts = table.column(name).value_counts()
    return zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
