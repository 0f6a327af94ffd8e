"""Whose output a folder is: all that the rows in it depend on, and how two of these differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hycluster.batch.input.corpus import ShardPlan
from hycluster.batch.job import Job
from hycluster.batch.prompts import VERSION

Identity = dict[str, Any]


def identity(job: Job, plan: ShardPlan) -> Identity:
    """All that the output depends on: two runs with equal identities may work on one output."""
    fields = {"model", "task", "prompt", "question", "summary", "sampling", "shard_rows"}
    settings = job.model_dump(mode="json", include=fields)
    return {
        "job": {**settings, "columns": job.input.columns.model_dump(), "prompts_version": VERSION},
        "input": {
            "files": len(plan.files),
            "rows": plan.rows,
            "shards": plan.shard_count,
            "digest": plan.digest(),
        },
    }


def identity_differences(theirs: Any, mine: Any, where: str = "") -> Iterator[str]:
    """One line for each value that differs, by its dotted key; the edition is not part of an identity."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in dict.fromkeys([*theirs, *mine]):
            if not where and key == "edition":
                continue
            yield from identity_differences(theirs.get(key), mine.get(key), f"{where}.{key}".lstrip("."))
    elif theirs != mine:
        if where == "input.digest":
            yield "the input's files differ"
        else:
            yield f"{where.removeprefix('job.')}: was {theirs!r}, is {mine!r}"
