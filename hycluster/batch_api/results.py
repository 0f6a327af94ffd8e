"""The committed parts of a batch as OpenAI's two files, in the order of the input.

The output file has the lines that were answered with 200, the error file all others: refused ones with
their response, those that the batch's end left unanswered with ``batch_cancelled`` or ``batch_expired``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hycluster.batch.input.corpus import ROW_ID, ShardPlan, read_shards, spans
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch_api.lines import NOT_RUN, request_hash
from hycluster.batch_api.records import BatchUsage, Ending
from hycluster.batch_api.requests import CUSTOM_ID
from hycluster.errors import JobFailed

LEFT = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
    "expired": ("batch_expired", "the batch's completion window ended before this request was answered"),
    # Lines of a batch that ran to its end were all asked.
    "completed": ("internal_error", "this request was not asked"),
}


class Results:
    """Writes both files of a batch and counts on the way.

    Args:
        name: what the batch's request ids begin with.

    Attributes:
        completed, failed: lines in the output file, and those in the error file that were asked.
        not_run: lines in the error file that were not.
    """

    def __init__(self, plan: ShardPlan, output: OutputFolder, *, name: str, ending: Ending) -> None:
        self._plan = plan
        self._output = output
        self._name = name
        self._code, self._message = LEFT[ending]
        self.completed = self.failed = self.not_run = 0
        self._sums = dict.fromkeys(BatchUsage.model_fields, 0)

    @property
    def usage(self) -> BatchUsage:
        return BatchUsage(**self._sums)

    def output_lines(self) -> Iterator[bytes]:
        """The output file, a shard's lines at a time.

        Raises:
            JobFailed: a part is not what its record says.
        """
        for record in self._output.records():
            if record.part is None:
                continue
            table = self._part(record.part.path, record.part.sha256)
            self.completed += table.num_rows
            self._sums["input_tokens"] += record.prompt_tokens
            self._sums["output_tokens"] += record.completion_tokens
            for column in ("cached_tokens", "reasoning_tokens"):
                self._sums[column] += sum(int(value) for value in table.column(column).to_pylist())
            yield _text(table, self._answered)

    def error_lines(self) -> Iterator[bytes]:
        """The error file, likewise."""
        done = self._output.done()
        for committed, shards in groupby(self._plan.shards(), lambda shard: shard.number in done):
            if committed:
                for shard in shards:
                    record = self._output.record(shard.number)
                    if record is not None and record.quarantine is not None:
                        yield _text(self._part(record.quarantine.path, record.quarantine.sha256), self._refused)
            else:
                for span in spans(shards):
                    for table in read_shards(self._plan.folder, span):
                        yield _text(table, self._left)

    def _answered(self, row: dict[str, Any]) -> str:
        return self._line(row, f'{{"status_code": 200, "request_id": "{self._id(row)}", "body": {row["output"]}}}')

    def _refused(self, row: dict[str, Any]) -> str:
        if row["error_message"] == NOT_RUN:
            return self._left(row)
        self.failed += 1
        try:
            answer = json.loads(row["error_message"])
            response = {"status_code": answer["status_code"], "request_id": self._id(row), "body": answer["body"]}
        except (ValueError, KeyError, TypeError):
            # Not an answer of the app: the batch machinery itself gave this line up.
            return self._line(row, "null", {"code": row["error_type"], "message": row["error_message"]})
        return self._line(row, json.dumps(response))

    def _left(self, row: dict[str, Any]) -> str:
        self.not_run += 1
        return self._line(row, "null", {"code": self._code, "message": self._message})

    def _line(self, row: dict[str, Any], response: str, error: dict[str, str] | None = None) -> str:
        return (
            f'{{"id": "batch_req_{self._id(row)}", "custom_id": {json.dumps(row[CUSTOM_ID])}, '
            f'"response": {response}, "error": {json.dumps(error)}}}\n'
        )

    def _id(self, row: dict[str, Any]) -> str:
        return request_hash(f"{self._name}-{row[ROW_ID]}")

    def _part(self, path: str, sha256: str) -> pa.Table:
        with self._output.folder.open_stream(path) as stream:
            data = stream.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise JobFailed(f"batches.store: {path}: its bytes are not those that were written")
        return pq.read_table(io.BytesIO(data))


def _text(table: pa.Table, line: Callable[[dict[str, Any]], str]) -> bytes:
    return "".join(line(row) for row in table.to_pylist()).encode()
