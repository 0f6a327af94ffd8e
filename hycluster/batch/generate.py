"""From shards of rows to committed shards: the Ray Data actor that asks the engines.

Rows go to the engines one by one, as many at a time as the task has slots for, across the borders of
shards and of blocks, so that the engines never run dry at a border. They go in input order, but where
others of the next few shards begin alike: these go together. A shard is committed when its last row is
through. Ray carries only input blocks in and one small record a shard out.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hycluster import logs
from hycluster.batch.ask import first_error
from hycluster.batch.input.corpus import REFUSAL, ROW_ID, SHARD, SHARD_BYTES
from hycluster.batch.input.tables import last, pick, unpack
from hycluster.batch.kept import KeptAnswers
from hycluster.batch.order import by_prefix
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.record import ShardRecord, Totals
from hycluster.batch.progress.terminal import RunProgress
from hycluster.batch.refusal import Reason, Refusal, RowRefused, refusal_of
from hycluster.batch.task import Answer, OpenTask, Task
from hycluster.errors import (
    HyclusterError,
    InvalidInput,
    JobFailed,
    PermissionDenied,
    SettingsError,
    Unauthenticated,
    UnknownModel,
)
from hycluster.observe.export import export_of_a_job
from hycluster.observe.timelines import Carried, recorder

# Blocks that one actor works on at once, so that the tail of one overlaps the head of the next.
BLOCKS_AT_ONCE = 4
REPORT_EVERY_S = 1.0
# Rows that are put in order together: the next whole shards with at least so many. All of them are open at a time then.
ORDERED_ROWS = 1024


NARROW = {pa.float32(): np.float32, pa.float16(): np.float16}

Report = Callable[[str, RunProgress], Any]


@dataclass(slots=True, eq=False)
class _OpenShard:
    """A shard in work.

    Attributes:
        rows: by position, why the row is not asked, or the task that gets its answer; None before that has begun.
        left: rows that are still to be asked.
        begun_at: when its first row was asked; 0 before.
    """

    number: int
    table: pa.Table
    rows: list[asyncio.Task[Answer | Refusal] | Refusal | None]
    left: int
    begun_at: float = 0.0


class Generate:
    """The callable class for ``map_batches``: a block of packed shards in, a row a shard out.

    Args:
        open_task: opens the task, once in each process; must be picklable.
        report: takes this process' name and its progress, about once a second.
        name: what the ids of all requests begin with.
        keep: write down now and then what is answered and not committed.
    """

    def __init__(
        self, output: OutputFolder, open_task: OpenTask, report: Report, *, name: str, keep: bool = False
    ) -> None:
        logs.settle("batch")
        export_of_a_job(recorder)
        self._output = output
        self._kept = KeptAnswers(output) if keep else None
        self._open_task = open_task
        self._report = report
        self._name = name
        self._process = uuid.uuid4().hex
        self._done = Totals()
        self._reasons: Counter[str] = Counter()
        self._in_flight = 0
        self._reported_s = 0.0
        self._feeding = asyncio.Lock()
        # Writing takes some five times a shard's size. Of those with cells larger than shards are meant to be, one at
        # a time.
        self._writing = asyncio.Lock()
        self._opened: AbstractAsyncContextManager[Task] | None = None
        self._task: Task | None = None

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Generate and commit all shards of a block; one row each, ``record``: its shard record as JSON.

        Raises:
            JobFailed: the engines can't serve; says why.
            SettingsError: they do not have the model.
        """
        self._tell()
        telling = asyncio.create_task(self._tell_now_and_then())
        try:
            async with asyncio.TaskGroup() as group:
                commits = await self._feed(block, group.create_task)
        except* Exception as errors:
            if self._kept:
                await asyncio.to_thread(self._kept.write)
            raise _first(errors) from None
        finally:
            telling.cancel()
            self._tell()
            # The last thing that this process is sure to do.
            await asyncio.to_thread(recorder.flush)
        return pa.table({"record": pa.array([task.result().to_json() for task in commits], pa.string())})

    async def _feed(self, block: pa.Table, start: Callable[..., asyncio.Task[Any]]) -> list[asyncio.Task[ShardRecord]]:
        # Ray runs a block again when its process died; what that one had committed is kept. Asked for before the
        # block's turn, so that no engine waits for the store.
        records = [(shard, start(asyncio.to_thread(self._output.record, _number(shard)))) for shard in unpack(block)]
        # One block after the other, so that few shards are open at a time.
        async with self._feeding:
            commits: list[asyncio.Task[ShardRecord]] = []
            together: list[tuple[pa.Table, ShardRecord | None]] = []
            for shard, reading in records:
                together.append((shard, await reading))
                if sum(shard.num_rows for shard, record in together if record is None) >= ORDERED_ROWS:
                    commits += await self._start_shards(together, start)
                    together = []
            return commits + await self._start_shards(together, start)

    async def _start_shards(
        self, shards: list[tuple[pa.Table, ShardRecord | None]], start: Callable[..., asyncio.Task[Any]]
    ) -> list[asyncio.Task[ShardRecord]]:
        """Ask all rows of some shards, in the order that is best for the engines."""
        commits = {_number(shard): start(_done(record)) for shard, record in shards if record is not None}
        if len(commits) < len(shards):
            task = await self._open()
            new = [self._opened_shard(shard) for shard, record in shards if record is None]
            for shard, position in await asyncio.to_thread(_in_order, task, new):
                await task.slots.acquire()
                self._in_flight += 1
                shard.begun_at = shard.begun_at or time.time()
                shard.rows[position] = start(self._row(task, shard.table, position))
                shard.left -= 1
                if not shard.left:
                    commits[shard.number] = start(self._commit(shard))
            for shard in new:
                if shard.number not in commits:
                    # All of its rows were refused when they were read.
                    commits[shard.number] = start(self._commit(shard))
        return [commits[_number(shard)] for shard, _ in shards]

    def _opened_shard(self, shard: pa.Table) -> _OpenShard:
        refusals = _refusals(shard)
        for refusal in refusals:
            if refusal:
                self._count(refusal)
        left = refusals.count(None)
        return _OpenShard(_number(shard), shard.drop_columns([SHARD]), [*refusals], left)

    async def _row(self, task: Task, shard: pa.Table, position: int) -> Answer | Refusal:
        try:
            row_id = last(shard, ROW_ID)[position].as_py()
            answer: Answer | Refusal
            try:
                kept = self._kept.get(row_id) if self._kept else None
                name = f"{self._name}-{row_id}"
                with Carried(name, "row", process="batch"):
                    answer = kept or await task.answer(_row_of(task, shard, position), name)
            except Exception as error:
                if _is_the_jobs(error):
                    raise
                answer = refusal_of(error)
        finally:
            self._in_flight -= 1
            task.slots.release()
        if self._kept:
            self._kept.add(row_id, answer)
        self._count(answer)
        return answer

    async def _commit(self, shard: _OpenShard) -> ShardRecord:
        answers = [await row if isinstance(row, asyncio.Task) else row for row in shard.rows]
        async with self._writing if shard.table.get_total_buffer_size() > SHARD_BYTES else nullcontext():
            return await self._write(shard, answers)

    async def _write(self, shard: _OpenShard, answers: list[Answer | Refusal | None]) -> ShardRecord:
        known = [answer for answer in answers if answer is not None]
        extra_columns = self._task.extra_columns if self._task else ()
        results, quarantined = split_answers(shard.table, known, extra_columns)
        ids = last(shard.table, ROW_ID)
        first = ids[0].as_py()
        if isinstance(known[0], Refusal) and known[0].error_type == Reason.UNREADABLE_FILE.value:
            # This row has the name of its file; the record says where a shard begins.
            first = f"{first}#0"
        begun_at = shard.begun_at or time.time()
        record = await asyncio.to_thread(
            self._output.commit, shard.number, first, results, quarantined, begun_at=begun_at
        )
        if self._kept:
            self._kept.forget(ids.to_pylist())
        return record

    async def _open(self) -> Task:
        # Called by the one block that feeds. Ray kills the process when the job ends: nothing to close.
        if self._task is None:
            self._opened = self._open_task()
            self._task = await self._opened.__aenter__()
            if self._kept:
                await asyncio.to_thread(self._kept.load)
        return self._task

    def _count(self, answer: Answer | Refusal) -> None:
        if isinstance(answer, Answer):
            self._done += Totals(1, 0, answer.prompt_tokens, answer.completion_tokens)
        else:
            self._done += Totals(1, 1)
            self._reasons[answer.error_type] += 1
        if time.monotonic() - self._reported_s >= REPORT_EVERY_S:
            self._tell()

    async def _tell_now_and_then(self) -> None:
        # While engines are away no row is counted, and how often they were asked is what one wants to know.
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self._tell()
            if self._kept and self._kept.due():
                await asyncio.to_thread(self._kept.write)

    def _tell(self) -> None:
        self._reported_s = time.monotonic()
        retries = self._task.ask.retries if self._task else 0
        parked = self._in_flight if self._task and self._task.starved else 0
        said = RunProgress(self._done, self._in_flight, retries, dict(self._reasons), parked, processes=1)
        self._report(self._process, said)


def split_answers(
    shard: pa.Table, answers: list[Answer | Refusal], extra_columns: Sequence[pa.Field] = ()
) -> tuple[pa.Table, pa.Table]:
    """The finished rows and the quarantined ones, each in input order, input columns unchanged."""
    if REFUSAL in shard.schema.names:
        shard = shard.drop_columns([REFUSAL])
    results = pick(shard, [place for place, answer in enumerate(answers) if isinstance(answer, Answer)])
    finished = [answer for answer in answers if isinstance(answer, Answer)]
    for name, kind in (
        ("output", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ):
        results = results.append_column(name, _column([getattr(answer, name) for answer in finished], kind))
    for place, column in enumerate(extra_columns):
        values = [answer.extra[place] if answer.extra else None for answer in finished]
        results = results.append_column(column.name, _column(values, column.type))
    quarantined = pick(shard, [place for place, answer in enumerate(answers) if isinstance(answer, Refusal)])
    for name in ("error_type", "error_message"):
        values = [getattr(answer, name) for answer in answers if isinstance(answer, Refusal)]
        quarantined = quarantined.append_column(name, _column(values, pa.string()))
    return results, quarantined


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        # Half a character, such as JSON can name in what a model says and in what a row asks: no shard ends for it.
        return pa.array([_escaped(value) for value in values], kind)


def _escaped(value: Any) -> Any:
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _refusals(shard: pa.Table) -> list[Refusal | None]:
    """By row, why it can't be asked, where that was found when it was read."""
    if REFUSAL not in shard.schema.names:
        return [None] * shard.num_rows
    return [Refusal(**refusal) if refusal else None for refusal in shard.column(REFUSAL).to_pylist()]


def _in_order(task: Task, shards: list[_OpenShard]) -> list[tuple[_OpenShard, int]]:
    """All rows that can be asked, those whose requests begin alike together."""
    rows = [(shard, place) for shard in shards for place, row in enumerate(shard.rows) if row is None]
    return [rows[place] for place in by_prefix([_prefix(task, shard.table, place) for shard, place in rows])]


def _prefix(task: Task, shard: pa.Table, position: int) -> str:
    try:
        return task.prefix(_row_of(task, shard, position))
    except Exception as error:
        if _is_the_jobs(error):
            raise
        # It will be refused, when it is its turn.
        return ""


def _row_of(task: Task, shard: pa.Table, position: int) -> dict[str, Any]:
    return {name: _value(shard, name, position) for name in task.columns}


def _is_the_jobs(error: Exception) -> bool:
    """Whether an error is no row's: engines that can't serve, or what is wrong for every row."""
    return isinstance(error, SettingsError) or (
        isinstance(error, HyclusterError) and not isinstance(error, InvalidInput)
    )


def _value(shard: pa.Table, name: str, position: int) -> Any:
    # Of the input's, where a column of the output's shares its name.
    place = shard.schema.get_all_field_indices(name)[0]
    kind = shard.schema.field(place).type
    try:
        value = shard.column(place)[position].as_py()
        # As short as its type makes it: 0.1 in 32 bits is 0.10000000149011612 in Python's 64.
        narrow = NARROW.get(kind)
        return value if narrow is None or value is None else float(str(narrow(value)))
    except UnicodeError:
        raise
    except Exception as error:
        # Such as a date that is out of Python's range, or in a time zone that nobody knows.
        raise RowRefused(Reason.WRONG_TYPE, f"{name}: is no {kind} that a prompt can take: {error}") from None


async def _done(record: ShardRecord) -> ShardRecord:
    return record


def _number(shard: pa.Table) -> int:
    number: int = shard.column(SHARD)[0].as_py()
    return number


def _first(errors: BaseException) -> Exception:
    """The first real error of a group, as one that survives the way to the driver."""
    error = first_error(errors)
    if isinstance(error, JobFailed | SettingsError):
        return error
    if isinstance(error, UnknownModel | Unauthenticated | PermissionDenied):
        return SettingsError(error.message)
    if isinstance(error, HyclusterError):
        return JobFailed(error.message)
    return JobFailed(f"{type(error).__name__}: {error}")
