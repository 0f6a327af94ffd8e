"""What is known of a committed shard: one small JSON object, in ``_shards/`` and in the manifest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# What JSON raises that is not JSON, or not what it should hold.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Written:
    """One immutable Parquet file, its path relative to the output."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What became of one shard. ``part`` and ``quarantine`` are None where they would have no rows.

    ``begun_at`` (its first row went to the engines) and ``committed_at`` are seconds since the epoch, by the
    clock of the machine that did it.
    """

    shard: int
    input_file: str
    first_row: int
    rows: int
    part: Written | None
    quarantine: Written | None
    prompt_tokens: int
    completion_tokens: int
    begun_at: float
    committed_at: float

    @property
    def quarantined(self) -> int:
        return self.quarantine.rows if self.quarantine else 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardRecord:
        files = {key: Written(**data[key]) if data[key] else None for key in ("part", "quarantine")}
        return cls(**{**data, **files})


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows that are through (with a result or quarantined) and tokens; they add up."""

    rows: int = 0
    quarantined: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Totals) -> Totals:
        # Written out, for it is called for every row.
        return Totals(
            self.rows + other.rows,
            self.quarantined + other.quarantined,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )
