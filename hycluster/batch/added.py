"""The columns that a job adds to the usual ones, and what of an answer is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from hycluster.batch.job import Job
from hycluster.batch.refusal import Reason, RowRefused
from hycluster.core import Output

# Column of the tree, where the job keeps it.
TREE = pa.field("tree", pa.string())
_KINDS = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


def added_columns(job: Job) -> tuple[pa.Field, ...]:
    """In the order in which they are written."""
    if job.task == "summarize":
        return (TREE,) if job.summary is not None and job.summary.keep_tree else ()
    several = [pa.field(name, pa.list_(pa.string())) for name in ("outputs", "finish_reasons")]
    return (
        *(several if job.sampling.n > 1 else ()),
        *((pa.field("tool_calls", pa.string()),) if job.tools else ()),
        *((pa.field("reasoning", pa.string()),) if job.output.reasoning else ()),
        *(pa.field(name, kind) for name, kind in _fields(job).items()),
    )


def added_values(job: Job, outputs: Sequence[Output]) -> tuple[Any, ...]:
    """One for each of them.

    Raises:
        RowRefused: the output has not the fields that are to be written.
    """
    first = outputs[0]
    values: list[Any] = []
    if job.sampling.n > 1:
        values += [[output.text for output in outputs], [output.finish_reason for output in outputs]]
    if job.tools:
        calls = [{key: value for key, value in asdict(call).items() if key != "index"} for call in first.tool_calls]
        values.append(json.dumps(calls, ensure_ascii=False) if calls else None)
    if job.output.reasoning:
        values.append(first.reasoning or None)
    if kinds := _fields(job):
        # One that calls a tool says nothing else.
        values += [None] * len(kinds) if first.tool_calls and not first.text else _read(first, kinds)
    return tuple(values)


def _fields(job: Job) -> dict[str, pa.DataType]:
    form = job.structured_output
    if not job.output.fields or form is None or form.json_schema is None:
        return {}
    return {name: _kind(schema) for name, schema in form.json_schema["properties"].items()}


def _kind(schema: Any) -> pa.DataType:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    named = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "null"]
    return _KINDS.get(named[0], pa.string()) if len(named) == 1 and isinstance(named[0], str) else pa.string()


def _read(output: Output, kinds: Mapping[str, pa.DataType]) -> list[Any]:
    try:
        said = json.loads(output.text)
    except (ValueError, RecursionError) as error:
        raise _invalid(output, f"is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise _invalid(output, f"is not an object but {type(said).__name__}")
    return [_value(output, name, said.get(name), kind) for name, kind in kinds.items()]


def _value(output: Output, name: str, value: Any, kind: pa.DataType) -> Any:
    if value is not None and kind == pa.string() and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is not None and kind == pa.float64() and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        pa.array([value], kind)
    except (pa.ArrowException, OverflowError) as error:
        raise _invalid(output, f"has a {name!r} that is no {kind}: {error}") from None
    return value


def _invalid(output: Output, why: str) -> RowRefused:
    return RowRefused(Reason.INVALID_OUTPUT, f"output: {why}; it ended by {output.finish_reason!r}")
