"""From shards of rows to committed shards: the Ray Data actor that asks the engines.

Rows go to the engines one by one in input order, at most ``rows_in_flight`` at a time, across the
borders of shards and of blocks, so that the engines never run dry at a border. A shard is
committed when its last row is through. Ray carries only input blocks in and one small record a
shard out.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from hycluster.batch.commit import Output, ShardRecord
from hycluster.batch.corpus import ROW_ID, SHARD
from hycluster.batch.job import Job
from hycluster.batch.prompts import Prompt, prompt_of
from hycluster.batch.report import Totals
from hycluster.core import Generation, GenerationRequest, Priority
from hycluster.errors import (
    HyclusterError,
    InvalidInput,
    JobFailed,
    Overloaded,
    SettingsError,
    Unauthenticated,
    UnknownModel,
)

# Blocks that one actor works on at once, so that the tail of one overlaps the head of the next.
BLOCKS_AT_ONCE = 4
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 15.0
REPORT_EVERY_S = 1.0


class Generator(Protocol):
    """What answers requests: a gateway over an engine pool."""

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation: ...


Connect = Callable[[], AbstractAsyncContextManager[Generator]]
Report = Callable[[str, Totals], Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished row."""

    output: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row for the quarantine: it can't be asked, or the engine says that its input is wrong."""

    error_type: str
    error_message: str


class Generate:
    """The callable class for ``map_batches``: a block with whole shards in, a row a shard out.

    Args:
        connect: opens the generator, once in each process; must be picklable.
        report: takes this process' name and its totals, at most once a second.
    """

    def __init__(self, job: Job, output: Output, connect: Connect, report: Report) -> None:
        self._job = job
        self._output = output
        self._prompt: Prompt = prompt_of(job)
        self._connect = connect
        self._report = report
        self._process = uuid.uuid4().hex
        self._totals = Totals()
        self._reported_s = 0.0
        self._slots = asyncio.Semaphore(max(1, job.rows_in_flight // job.generate_processes))
        self._feeding = asyncio.Lock()
        self._opened: AbstractAsyncContextManager[Generator] | None = None
        self._generator: Generator | None = None

    async def __call__(self, block: pa.Table) -> pa.Table:
        """Generate and commit all shards of a block; one row each, ``record``: its shard record as JSON.

        Raises:
            JobFailed: the engines can't serve; says why.
            SettingsError: they do not have the model.
        """
        try:
            async with asyncio.TaskGroup() as group:
                commits = await self._feed(block, group.create_task)
        except* Exception as errors:
            raise _first(errors) from None
        finally:
            self._report(self._process, self._totals)
        return pa.table({"record": pa.array([task.result().to_json() for task in commits], pa.string())})

    async def _feed(self, block: pa.Table, start: Callable[..., asyncio.Task[Any]]) -> list[asyncio.Task[ShardRecord]]:
        # One block after the other, so that few shards are open at a time.
        async with self._feeding:
            return [await self._start_shard(shard, start) for shard in _shards(block)]

    async def _start_shard(self, shard: pa.Table, start: Callable[..., asyncio.Task[Any]]) -> asyncio.Task[ShardRecord]:
        number = shard.column(SHARD)[0].as_py()
        # Ray runs a block again when its process died; what that one had committed is kept.
        record = await asyncio.to_thread(self._output.record, number)
        shard = shard.drop_columns([SHARD])
        rows: list[asyncio.Task[Answer | Refusal]] = []
        begun_at = time.time()
        if record is None:
            generator = await self._open()
            begun_at = time.time()
            for position in range(shard.num_rows):
                await self._slots.acquire()
                rows.append(start(self._row(generator, shard, position)))
        return start(self._commit(number, shard, rows, record, begun_at))

    async def _row(self, generator: Generator, shard: pa.Table, position: int) -> Answer | Refusal:
        try:
            row_id = shard.column(ROW_ID)[position].as_py()
            answer: Answer | Refusal
            try:
                row = {name: shard.column(name)[position].as_py() for name in self._prompt.columns}
                request = GenerationRequest(
                    model=self._job.model,
                    messages=self._prompt.messages(row),
                    sampling=self._job.sampling,
                    priority=Priority.BATCH,
                    request_id=f"{self._job.name}-{row_id}",
                )
                answer = await self._ask(generator, request)
            except (InvalidInput, UnicodeDecodeError) as error:
                answer = Refusal(type(error).__name__, str(error))
        finally:
            self._slots.release()
        self._count(answer)
        return answer

    async def _ask(self, generator: Generator, request: GenerationRequest) -> Answer:
        """Ask until there is an answer or ``retry_s`` have passed without one."""
        give_up_s = time.monotonic() + self._job.retry_s
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                generation = await generator.generate(request)
                break
            except (InvalidInput, UnknownModel, Unauthenticated):
                raise
            except (HyclusterError, ConnectionError, TimeoutError) as error:
                # Being told to wait is no failure: online traffic goes first, for as long as it takes.
                if time.monotonic() >= give_up_s and not isinstance(error, Overloaded):
                    raise JobFailed(
                        f"row {request.request_id}: no engine could serve it for {self._job.retry_s:g} s: {error}"
                    ) from None
                await asyncio.sleep(getattr(error, "retry_after_s", None) or backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
        (output,), usage = generation.outputs, generation.usage
        return Answer(
            output.text,
            output.finish_reason,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else len(output.token_ids),
        )

    async def _commit(
        self,
        number: int,
        shard: pa.Table,
        rows: list[asyncio.Task[Answer | Refusal]],
        record: ShardRecord | None,
        begun_at: float,
    ) -> ShardRecord:
        if record is not None:
            return record
        answers = [await row for row in rows]
        results, quarantined = split(shard, answers)
        first = shard.column(ROW_ID)[0].as_py()
        return await asyncio.to_thread(self._output.commit, number, first, results, quarantined, begun_at=begun_at)

    async def _open(self) -> Generator:
        # Called by the one block that feeds. Ray kills the process when the job ends: nothing to close.
        if self._generator is None:
            self._opened = self._connect()
            self._generator = await self._opened.__aenter__()
        return self._generator

    def _count(self, answer: Answer | Refusal) -> None:
        if isinstance(answer, Answer):
            self._totals += Totals(1, 0, answer.prompt_tokens, answer.completion_tokens)
        else:
            self._totals += Totals(1, 1)
        if time.monotonic() - self._reported_s >= REPORT_EVERY_S:
            self._reported_s = time.monotonic()
            self._report(self._process, self._totals)


def split(shard: pa.Table, answers: list[Answer | Refusal]) -> tuple[pa.Table, pa.Table]:
    """The finished rows and the quarantined ones, each in input order, input columns unchanged."""
    finished = pa.array([isinstance(answer, Answer) for answer in answers], pa.bool_())
    results = shard.filter(finished)
    for name, kind in (
        ("output", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ):
        values = [getattr(answer, name) for answer in answers if isinstance(answer, Answer)]
        results = results.append_column(name, pa.array(values, kind))
    quarantined = shard.filter(pa.array([isinstance(answer, Refusal) for answer in answers], pa.bool_()))
    for name in ("error_type", "error_message"):
        values = [getattr(answer, name) for answer in answers if isinstance(answer, Refusal)]
        quarantined = quarantined.append_column(name, pa.array(values, pa.string()))
    return results, quarantined


def _shards(block: pa.Table) -> Iterator[pa.Table]:
    """The runs of rows with one shard number. A shard is never cut between blocks."""
    numbers = block.column(SHARD).to_numpy()
    start = 0
    while start < block.num_rows:
        end = start + int((numbers[start:] == numbers[start]).sum())
        yield block.slice(start, end - start)
        start = end


def _first(errors: BaseException) -> Exception:
    """The first real error of a group, as one that survives the way to the driver."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    if isinstance(errors, JobFailed):
        return errors
    if isinstance(errors, UnknownModel | Unauthenticated):
        return SettingsError(errors.message)
    if isinstance(errors, HyclusterError):
        return JobFailed(errors.message)
    return JobFailed(f"{type(errors).__name__}: {errors}")
