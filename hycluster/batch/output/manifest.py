"""Read a manifest back, whatever its size: one shard at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from hycluster.batch.output.record import DAMAGE, ShardRecord
from hycluster.errors import InvalidInput
from hycluster.storage import masked_line


def read_manifest(lines: io.TextIOWrapper) -> tuple[dict[str, Any], Iterator[ShardRecord]]:
    """The manifest's head and its shards, one at a time.

    The job writes a line a shard, and so it is read, whatever its size; JSON in another layout is read at once.

    Raises:
        InvalidInput: it is damaged; so does the iterator.
    """
    try:
        first = lines.readline()
        if first.rstrip().endswith("["):
            return json.loads(first + "]}"), _shard_lines(lines)
        whole = json.loads(first + lines.read())
        return whole, iter([ShardRecord.from_dict(shard) for shard in whole["shards"]])
    except (OSError, *DAMAGE) as error:
        raise _unreadable(error) from None


def _shard_lines(lines: io.TextIOWrapper) -> Iterator[ShardRecord]:
    try:
        for line in lines:
            if line.strip() == "]}":
                return
            if line.strip():
                yield ShardRecord.from_dict(json.loads(line.rstrip().removesuffix(",")))
        raise ValueError("it ends too soon")
    except (OSError, *DAMAGE) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> InvalidInput:
    return InvalidInput(f"_manifest.json: can't be read: {type(error).__name__}: {masked_line(error)}")
