"""Whose output a folder is: all that the rows in it depend on, and how two of these differ."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count
from typing import Any

from hycluster.batch.added import added_columns
from hycluster.batch.input.corpus import ADDED, ShardPlan
from hycluster.batch.job import Job
from hycluster.batch.prompts import VERSION
from hycluster.errors import SettingsError

Identity = dict[str, Any]
SUFFIX = "columns_suffix"


def identity(job: Job, plan: ShardPlan) -> Identity:
    """All that the output depends on: two runs with equal identities may work on one output."""
    fields = {"model", "task", "prompt", "question", "summary", "sampling", "shard_rows"}
    settings = job.model_dump(mode="json", include=fields)
    # Only where they are set, so that outputs from before there were these are still known.
    newer = {"structured_output", "tools", "tool_choice", "chat_template_kwargs"}
    settings |= job.model_dump(mode="json", include=newer, exclude_none=True)
    settings |= {f"output_{name}": True for name in ("fields", "reasoning") if getattr(job.output, name)}
    # Whose trace a row is in changes nothing of its answer.
    columns = job.input.columns.model_dump(exclude={"traceparent"})
    if not columns["sampling"]:
        del columns["sampling"]
    suffix = columns_suffix(job, plan)
    if suffix:
        settings[SUFFIX] = suffix
    return {
        "job": {**settings, "columns": columns, "prompts_version": VERSION},
        "input": {
            "files": len(plan.files),
            "rows": plan.rows,
            "shards": plan.shard_count,
            "digest": plan.digest(),
            # Only of a table, so that outputs from before there were snapshots are still known.
            **({} if plan.snapshot is None else {"snapshot": plan.snapshot}),
        },
    }


def columns_suffix(job: Job, plan: ShardPlan) -> str:
    """What the names of the columns that the job adds end with.

    Raises:
        SettingsError: with the ending that the job asks for, the input has one of these names.
    """
    added = (*ADDED, *(column.name for column in added_columns(job)))
    wanted = job.output.columns_suffix
    if wanted is None:
        # The input may be the output of a job, or of a chain of them.
        endings = chain([""], (f"_{number}" for number in count(2)))
        return next(ending for ending in endings if not plan.taken & {name + ending for name in added})
    twice = sorted(plan.taken & {name + wanted for name in added})
    if twice:
        raise SettingsError(f"output.columns_suffix: {wanted!r}: the input has a column {twice[0]!r} already")
    return wanted


def suffix_in(identity: Identity) -> str:
    """The same, of an output that is there."""
    job = identity.get("job")
    return str(job.get(SUFFIX, "")) if isinstance(job, dict) else ""


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
