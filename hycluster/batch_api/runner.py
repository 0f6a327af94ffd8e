"""One batch from its uploaded file to its output files, as a job of ``hycluster/batch``.

validate (JSONL -> Parquet) -> plan -> lease -> claim -> ask and commit, shard by shard -> settle how it
ends -> write both files -> final status. Every stop leaves a record behind; started again after any
failure it goes on from the last one, and asks only the shards that have no record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, nullcontext
from itertools import islice
from typing import Any

import pyarrow as pa

from hycluster.batch.ask import first_error
from hycluster.batch.generate import Generate
from hycluster.batch.input import corpus
from hycluster.batch.input.corpus import Shard, ShardPlan
from hycluster.batch.input.tables import pack
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.lease import Lease
from hycluster.batch_api.lateness import Lateness
from hycluster.batch_api.ledger_lines import LedgerLines
from hycluster.batch_api.lines import BatchEngines, LinesTask
from hycluster.batch_api.records import FINAL, Batch, Ending, LineError, State, new_record_id
from hycluster.batch_api.requests import Refused, convert
from hycluster.batch_api.results import Results
from hycluster.batch_api.store import Store
from hycluster.errors import NotFound
from hycluster.settings.ingress import Batches
from hycluster.settings.load import MAX_MEMBERS
from hycluster.storage import WritableFolder, masked_line

log = logging.getLogger(__name__)

# Opens the API's app over all models, once there is something to ask.
Connect = Callable[[], Awaitable[BatchEngines]]
# What one read brings in, and how many reads of a batch are in the engines' queue: more if they are small.
BLOCK_SHARDS = 4
BLOCKS_AT_ONCE, BYTES_AT_ONCE = 2, 32 << 20
# Most lines of a batch that wait for the engines or are there, where the settings leave it to the engines.
OPEN_LINES = 4096


class Runner:
    """Runs batches, any number side by side.

    Args:
        ledger: takes what lines are answered; None where there is no ledger.
    """

    def __init__(
        self,
        store: Store,
        settings: Batches,
        connect: Connect,
        max_members: int = MAX_MEMBERS,
        ledger: LedgerLines | None = None,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._settings = settings
        self._connect = connect
        self._max_members = max_members
        # Held by each line while it is asked, over all batches.
        self._in_flight = asyncio.Semaphore(most) if (most := settings.lines_in_flight) is not None else None

    async def run(self, batch_id: str) -> None:
        """Bring a batch to its end.

        Raises:
            JobFailed: another process has it, or it can't go on now.
            OSError: nor can the store.
        """
        try:
            batch = await asyncio.to_thread(self._store.batch, batch_id)
        except NotFound:
            # Its ingress process wrote the mark and not the batch yet; or has died in between, then nobody waits for
            # it.
            return
        async with self._lease(batch) as lease:
            state = await asyncio.to_thread(self._store.state, batch_id)
            if state.status not in FINAL:
                state = await self._to_its_end(batch, state, lease)
        await asyncio.to_thread(self._store.close_batch, batch_id)
        log.info("batch %s: %s, %d of %d requests completed", batch_id, state.status, state.completed, state.total)

    async def fail(self, batch_id: str, error: Exception) -> None:
        """End a batch that could not be brought to its end."""
        state = await asyncio.to_thread(self._store.state, batch_id)
        reason = LineError(code="internal_error", message=f"{type(error).__name__}: {masked_line(error)}")
        ids = {"output_file_id": None, "error_file_id": None}
        changes = {"status": "failed", "ended_at": _now(), "errors": (reason,), **ids}
        await self._save(batch_id, state.model_copy(update=changes))
        await asyncio.to_thread(self._store.close_batch, batch_id)

    @asynccontextmanager
    async def _lease(self, batch: Batch) -> AsyncIterator[Lease]:
        # Not as a block: taking and giving back may take the store a while.
        lease = Lease(self._output(batch))
        try:
            await asyncio.to_thread(lease.take)
            yield lease
        finally:
            await asyncio.shield(asyncio.to_thread(lease.__exit__, None, None, None))

    async def _to_its_end(self, batch: Batch, state: State, lease: Lease) -> State:
        if state.status == "validating":
            state = await asyncio.to_thread(self._validate, batch)
            await self._save(batch.id, state)
            if state.status in FINAL:
                return state
        plan = await asyncio.to_thread(
            corpus.plan_shards, self._input(batch), shard_rows=state.shard_lines, check=lambda schema, name: None
        )
        output = OutputFolder(self._output(batch))
        await asyncio.to_thread(output.claim, _identity(batch, plan))
        if state.ending is None:
            ending = await self._ask(batch, state, plan, output, lease)
            state = state.model_copy(
                update={
                    "status": "finalizing",
                    "ending": ending,
                    "finalizing_at": _now(),
                    # Settled before they are written: a second attempt writes the same files.
                    "output_file_id": new_record_id("file-"),
                    "error_file_id": new_record_id("file-"),
                }
            )
            await self._save(batch.id, state)
        state = await asyncio.to_thread(self._write_files, batch, state, plan, output)
        lease.check()
        await self._save(batch.id, state)
        return state

    def _validate(self, batch: Batch) -> State:
        self._store.work(batch.id).make("input")
        try:
            with closing(self._store.open_content(batch.input_file_id)) as content:
                checked = convert(
                    content,
                    self._input(batch),
                    endpoint=batch.endpoint,
                    max_lines=self._settings.max_lines,
                    max_members=self._max_members,
                    group_lines=self._settings.shard_lines * BLOCK_SHARDS,
                )
        except Refused as refused:
            return State(status="failed", ended_at=_now(), errors=refused.errors)
        except NotFound as error:
            reason = LineError(code="input_file_not_found", message=error.message, param="input_file_id")
            return State(status="failed", ended_at=_now(), errors=(reason,))
        return State(
            status="in_progress",
            total=checked.lines,
            model=checked.model,
            in_progress_at=_now(),
            shard_lines=self._settings.shard_lines,
        )

    async def _ask(self, batch: Batch, state: State, plan: ShardPlan, output: OutputFolder, lease: Lease) -> Ending:
        """Ask all lines that have no committed answer, until they have or the batch is to end before."""
        ending = await self._to_end_now(batch)
        if ending is not None:
            return ending
        earlier = await asyncio.to_thread(_committed, output)
        open_lines = self._settings.lines_in_flight or OPEN_LINES
        feed = _Feed(self._connect, batch, plan, output, self._in_flight, open_lines, self._ledger)
        lateness = Lateness(batch.expires_at - time.time(), batch.expires_at)
        feeding = asyncio.create_task(feed.run())
        try:
            while True:
                await asyncio.wait({feeding}, timeout=self._settings.poll_s)
                if feeding.done():
                    if not feeding.cancelled():
                        feeding.result()
                    return ending or "completed"
                lease.check()
                if ending is None:
                    left = state.total - sum(earlier) - sum(feed.counts)
                    feed.hurry(batch.expires_at if lateness.late(sum(feed.counts), left, time.time()) else None)
                    state = await self._show_progress(batch, state, feed.starved, earlier, feed.counts)
                    ending = await self._to_end_now(batch)
                    if ending is not None and not feed.stop():
                        feeding.cancel()
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _show_progress(self, batch: Batch, state: State, waiting: bool, *counts: tuple[int, int]) -> State:
        completed, failed = (sum(part) for part in zip(*counts, strict=True))
        now = state.model_copy(update={"completed": completed, "failed": failed, "waiting": waiting})
        if now != state:
            await self._save(batch.id, now)
        return now

    async def _to_end_now(self, batch: Batch) -> Ending | None:
        """How the batch is to end, whatever is left to do; None while it may go on."""
        if await asyncio.to_thread(self._store.cancelling_at, batch.id) is not None:
            return "cancelled"
        return "expired" if time.time() >= batch.expires_at else None

    def _write_files(self, batch: Batch, state: State, plan: ShardPlan, output: OutputFolder) -> State:
        assert state.ending is not None
        # Before anybody has an answer; of shards that were committed by one who was killed then, too.
        _enter(self._ledger, batch, output, output.done())
        results = Results(plan, output, name=batch.id, ending=state.ending)
        update: dict[str, Any] = {"status": state.ending, "ended_at": _now()}
        for field, kind, lines in (
            ("output_file_id", "output", results.output_lines()),
            ("error_file_id", "error", results.error_lines()),
        ):
            file_id = getattr(state, field)
            size = self._store.write_content(file_id, lines)
            if size:
                name = f"{batch.id}_{kind}.jsonl"
                self._store.register(file_id, size, name, "batch_output", batch.output_expires_after_s, batch.caller)
            else:
                self._store.delete_file(file_id)
                update[field] = None
        update |= {"completed": results.completed, "failed": results.failed, "usage": results.usage}
        return state.model_copy(update=update)

    async def _save(self, batch_id: str, state: State) -> None:
        await asyncio.to_thread(self._store.save_state, batch_id, state)

    def _input(self, batch: Batch) -> WritableFolder:
        return self._store.work(batch.id).below("input/lines.parquet")

    def _output(self, batch: Batch) -> WritableFolder:
        return self._store.work(batch.id).below("output")


class _Feed:
    """Reads a batch's lines, has them asked and committed."""

    def __init__(
        self,
        connect: Connect,
        batch: Batch,
        plan: ShardPlan,
        output: OutputFolder,
        in_flight: asyncio.Semaphore | None,
        open_lines: int,
        ledger: LedgerLines | None,
    ) -> None:
        self._ledger = ledger
        self._connect = connect
        self._batch = batch
        self._plan = plan
        self._output = output
        self._in_flight = in_flight
        self._open_lines = open_lines
        self._lines: LinesTask | None = None
        self._stopped = False

    @property
    def counts(self) -> tuple[int, int]:
        """Lines completed and failed so far, committed or not."""
        return (self._lines.completed, self._lines.failed) if self._lines else (0, 0)

    @property
    def starved(self) -> bool:
        return self._lines is not None and self._lines.starved

    def hurry(self, urgent_at: float | None) -> None:
        """See ``LinesTask``."""
        if self._lines is not None:
            self._lines.hurry(urgent_at)

    def stop(self) -> bool:
        """Ask no more, commit what is answered; False if nothing was asked yet."""
        self._stopped = True
        if self._lines is None:
            return False
        self._lines.stop()
        return True

    async def run(self) -> None:
        """Return when all lines are committed, or soon after ``stop``.

        Raises:
            JobFailed: it can't go on.
        """
        done = await asyncio.to_thread(self._output.done)
        pending = (shard for shard in self._plan.shards() if shard.number not in done)
        lines = LinesTask(await self._connect(), self._batch, self._in_flight, self._open_lines)
        self._lines = lines
        generate = Generate(self._output, lambda: nullcontext(lines), lambda *_: None, name=self._batch.id)
        ahead = _ReadAhead()

        async def commit(shards: list[Shard], block: pa.Table, size: int) -> None:
            try:
                await generate(block)
                await asyncio.to_thread(_enter, self._ledger, self._batch, self._output, (s.number for s in shards))
            finally:
                ahead.done(size)

        try:
            async with asyncio.TaskGroup() as group:
                for block in _blocks(pending):
                    size = sum(shard.bytes for shard in block)
                    await ahead.begin(size)
                    if self._stopped:
                        break
                    group.create_task(commit(block, await asyncio.to_thread(self._read, block), size))
        except* Exception as errors:
            raise first_error(errors) from None

    def _read(self, shards: list[Shard]) -> pa.Table:
        return pa.concat_tables(map(pack, corpus.read_shards(self._plan.folder, shards)))


class _ReadAhead:
    """How much of a batch is in memory: a few blocks, or as many as are small."""

    def __init__(self) -> None:
        self._blocks = self._bytes = 0
        self._fewer = asyncio.Event()

    async def begin(self, size: int) -> None:
        """Wait until a block of so many bytes may be read."""
        while self._blocks >= BLOCKS_AT_ONCE and self._bytes + size > BYTES_AT_ONCE:
            self._fewer.clear()
            await self._fewer.wait()
        self._blocks += 1
        self._bytes += size

    def done(self, size: int) -> None:
        self._blocks -= 1
        self._bytes -= size
        self._fewer.set()


def _blocks(shards: Iterator[Shard]) -> Iterator[list[Shard]]:
    while block := list(islice(shards, BLOCK_SHARDS)):
        yield block


def _committed(output: OutputFolder) -> tuple[int, int]:
    """Lines of committed shards, completed and failed."""
    completed = failed = 0
    for record in output.records():
        completed += record.rows - record.quarantined
        failed += record.quarantined
    return completed, failed


def _enter(ledger: LedgerLines | None, batch: Batch, output: OutputFolder, shards: Iterable[int]) -> None:
    if ledger is not None:
        for shard in shards:
            ledger.enter(batch, output, shard)


def _identity(batch: Batch, plan: ShardPlan) -> dict[str, Any]:
    """What the output depends on, as ``OutputFolder.claim`` wants it."""
    return {
        "job": {"batch": batch.id, "endpoint": batch.endpoint, "shard_rows": plan.shard_rows},
        "input": {"rows": plan.rows, "shards": plan.shard_count, "digest": plan.digest()},
    }


def _now() -> int:
    return int(time.time())
