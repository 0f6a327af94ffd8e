"""Finished outputs without engines and without Ray: rows are answered here and committed as the job would."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch.generate import split_answers
from hycluster.batch.input.apart import footers_apart
from hycluster.batch.input.corpus import REFUSAL, SHARD, Shard, plan_shards, read_shards, spans
from hycluster.batch.job import Job
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.identity import identity
from hycluster.batch.output.record import Totals
from hycluster.batch.prompts import prompt_of
from hycluster.batch.refusal import Refusal
from hycluster.batch.task import Answer
from tests.located import at


def answered(text: str | None) -> Answer | Refusal:
    """In capitals, a token a word; a row without text is refused."""
    if text is None:
        return Refusal("NullValue", "text: is null")
    return Answer(text.upper(), "stop" if text else "length", 1 + len(text.split()), len(text.split()))


def commit_all(
    job: Job, *, first: int | None = None, finish: bool = True, begun_at: float = 1000.0, apart_s: float = 1.0
) -> Path:
    """Commit the first shards of a job, or all; shard n takes from ``begun_at + n * apart_s`` to this moment."""
    corpus = plan_shards(
        at(job.input.path),
        shard_rows=job.shard_rows,
        check=prompt_of(job).check,
        read_footers=footers_apart,
        snapshot=job.input.snapshot,
    )
    output = OutputFolder(at(job.output.path))
    mine = identity(job, corpus)
    output.claim(mine)
    totals = Totals()
    shards: list[Shard] = list(corpus.shards())[:first]
    for span in spans(shards):
        for shard, table in zip(span, read_shards(corpus.folder, span), strict=True):
            marks = table[REFUSAL].to_pylist() if REFUSAL in table.schema.names else [None] * table.num_rows
            texts = table["text"].to_pylist() if table.schema.names.count("text") == 1 else [None] * table.num_rows
            answers = [Refusal(**mark) if mark else answered(text) for mark, text in zip(marks, texts, strict=True)]
            results, refused = split_answers(table.drop_columns([SHARD]), answers)
            row_id = f"{shard.file.path}#{shard.first_row}"
            r = output.commit(shard.number, row_id, results, refused, begun_at=begun_at + shard.number * apart_s)
            totals += Totals(r.rows, r.quarantined, r.prompt_tokens, r.completion_tokens)
    if finish:
        output.finish(mine, asdict(totals))
    return Path(job.output.path)


def parts(out: Path) -> list[Path]:
    """The part files in the order of the shards."""
    return sorted(out.glob("part-*.parquet"))


def forge(out: Path, shard: int, table: pa.Table) -> None:
    """Put another table in place of a shard's part, with bytes, sha256 and rows right again everywhere."""
    manifest = json.loads((out / "_manifest.json").read_text())
    record: dict[str, Any] = manifest["shards"][shard]
    path = out / record["part"]["path"]
    pq.write_table(table, path)
    data = path.read_bytes()
    record["part"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=table.num_rows)
    (out / "_manifest.json").write_text(json.dumps(manifest))
    record_file(out, shard).write_text(json.dumps(record))


def record_file(out: Path, shard: int) -> Path:
    (path,) = (out / "_shards").glob(f"{shard:08d}*.json")
    return path
