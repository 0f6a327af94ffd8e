"""A line of the ledger, as it is written by the process that answers and as Parquet has it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

import msgspec
import pyarrow as pa

Tier = Literal["online", "batch"]
# Refused: admitted, and then no engine was asked. Failed: one was, and there is no whole answer.
Outcome = Literal["finished", "refused", "cancelled", "failed"]
# A price has at most six places behind the point for it to be exact, and is of a million tokens.
COST_PLACES = 12
DAY = "%Y-%m-%d"
COST = pa.decimal128(38, COST_PLACES)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one request has had. Times are in seconds since the epoch.

    Attributes:
        requests: 1; 0 for what came after its line was written, by a request that asks engines several times.
        once: of lines with the same the last one counts: an answer that was begun again. Empty: it counts.
        tenant, project, key, key_name: whose; empty where nobody is asked. A key's id and name, a token's subject.
        model: the model or the adapter that was asked.
        operation: how it came: ``POST /v1/chat/completions``, ``grpc Generate``.
        input_tokens: of the prompts; ``cached_tokens`` of them were in the KV cache.
        cost: by the price of its time.
    """

    request_id: str
    requests: int
    once: str
    tenant: str
    project: str
    key: str
    key_name: str
    model: str
    operation: str
    tier: Tier
    outcome: Outcome
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost: Decimal
    started_at: float
    ended_at: float

    def line(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"

    @property
    def day(self) -> str:
        """Of its end."""
        return day_of(self.ended_at)


def day_of(seconds: float) -> str:
    """UTC's, of a time in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).strftime(DAY)


_TYPES = {"int": pa.int64(), "float": pa.float64(), "Decimal": COST}
SCHEMA = pa.schema([pa.field(each.name, _TYPES.get(str(each.type), pa.string())) for each in fields(Entry)])


def entries_in(data: bytes) -> Iterator[Entry]:
    """Those that were written whole: the end of a file whose writer was killed may be torn.

    Raises:
        KeyError, TypeError: a line is whole and no entry. Another version has written it; it must not be lost.
    """
    for line in data.split(b"\n"):
        try:
            told: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        yield Entry(**told | {"cost": Decimal(told["cost"])})


def as_table(entries: Iterable[Entry]) -> pa.Table:
    told, quantum = list(entries), Decimal(1).scaleb(-COST_PLACES)
    columns = {name: [getattr(entry, name) for entry in told] for name in SCHEMA.names}
    columns["cost"] = [cost.quantize(quantum) for cost in columns["cost"]]
    return pa.Table.from_pydict(columns, schema=SCHEMA)
