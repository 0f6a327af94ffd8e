"""The lines of a batch in the usage ledger: from what is committed of its output, so what it says is what its caller
gets, whoever was killed and however often a line was asked."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pyarrow.parquet as pq

from hycluster.auth.caller import recorded
from hycluster.batch.input.corpus import ROW_ID
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.record import ShardRecord
from hycluster.batch_api.lines import request_hash
from hycluster.batch_api.records import Batch
from hycluster.batch_api.requests import BODY
from hycluster.ledger.account import CostOf
from hycluster.ledger.books import Books
from hycluster.ledger.entry import Entry, day_of

_COLUMNS = [ROW_ID, BODY, "prompt_tokens", "completion_tokens", "cached_tokens", "pool"]


class LedgerLines:
    """Enters the shards of a batch: each is a piece of the ledger by itself."""

    def __init__(self, books: Books, cost_of: CostOf) -> None:
        self._books = books
        self._cost_of = cost_of

    def enter(self, batch: Batch, output: OutputFolder, shard: int) -> None:
        """A shard is committed: its answers are in the ledger from now on, unless they are already.

        Raises:
            OSError: the store is away.
        """
        record, piece = output.record(shard), f"{batch.id}-{shard:08d}"
        if record is None or record.part is None or self._books.holds(day_of(record.committed_at), piece):
            return
        self._books.commit(piece, self._entries(batch, output, record.part.path, record))

    def _entries(self, batch: Batch, output: OutputFolder, part: str, record: ShardRecord) -> Iterator[Entry]:
        caller = recorded(batch.caller)
        with output.folder.open_stream(part) as stream:
            # Unlike `read_table` it takes a part of an earlier version, which has no pool.
            table = pq.ParquetFile(io.BytesIO(stream.read())).read(columns=_COLUMNS)
        for row in table.to_pylist():
            named = str(json.loads(row[BODY]).get("model") or "")
            pool = row.get("pool") or named
            tokens = row["prompt_tokens"], int(row["cached_tokens"]), row["completion_tokens"]
            yield Entry(
                request_id=request_hash(f"{batch.id}-{row[ROW_ID]}"),
                requests=1,
                once="",
                tenant=caller.tenant if caller else "",
                project=caller.project if caller else "",
                key=(caller.key_id or caller.key) if caller else "",
                key_name=caller.key if caller else "",
                model=named or pool,
                operation=f"POST {batch.endpoint}",
                tier="batch",
                outcome="finished",
                input_tokens=tokens[0],
                cached_tokens=tokens[1],
                output_tokens=tokens[2],
                cost=self._cost_of(pool, *tokens),
                started_at=record.begun_at,
                ended_at=record.committed_at,
            )
