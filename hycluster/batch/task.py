"""What a job does with one row: a chat with the model, or a tree of summaries where the text is too long for one."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa

from hycluster.batch.added import added_columns, added_values
from hycluster.batch.ask import Asker, RowBackend
from hycluster.batch.job import Job, Summary
from hycluster.batch.prompts import Messages, Prompt, Row, prompt_of
from hycluster.batch.summaries.summarizer import Summarizer
from hycluster.core import GenerationRequest, Priority, Sampling
from hycluster.gateway.bulk import FIXED_ROWS


class RowSlots(Protocol):
    """A semaphore, as far as it is needed."""

    async def acquire(self) -> Any: ...

    def release(self) -> None: ...


class Places(RowSlots, Protocol):
    """A job's places in the engines; see :class:`hycluster.gateway.bulk.BulkLane`."""

    @property
    def starved(self) -> bool: ...

    @property
    def alive_s(self) -> float: ...

    def take(self) -> None: ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class JobBackend(RowBackend, Protocol):
    """What answers a job's requests, and says how many of them it has room for."""

    def lane(self, model: str, job: str, most: int | None = None, fixed: int = FIXED_ROWS) -> Places:
        """The places of one job's rows in the engines; see :class:`hycluster.gateway.bulk.BulkLanes`."""


# What no row is at fault for, and how long it may take.
PROBE: Messages = [{"role": "user", "content": "Hello"}]
PROBE_S = 60.0
WHOLE_NUMBERS = ("max_tokens", "min_tokens", "top_k", "seed")
Connect = Callable[[], AbstractAsyncContextManager[JobBackend]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished row. ``extra`` are the values of the task's ``extra_columns``."""

    output: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    extra: tuple[Any, ...] = ()


class Task(Protocol):
    """Answers rows.

    Attributes:
        columns: the input columns that it reads.
        extra_columns: columns that it adds to the usual ones.
        ask: makes its calls.
    """

    columns: tuple[str, ...]
    extra_columns: tuple[pa.Field, ...]
    ask: Asker

    @property
    def slots(self) -> RowSlots:
        """A row holds one while it is answered; they bound what is open at a time."""

    @property
    def starved(self) -> bool:
        """The engines have no time for any of its rows: they serve online requests."""

    def prefix(self, row: Row) -> str:
        """What its request begins with, given the values of ``columns``: rows with equal ones are asked together.

        Raises:
            InvalidInput: this row can't be asked.
        """

    async def answer(self, row: Row, request_id: str) -> Answer:
        """Answer one row, given the values of ``columns``. The row holds a slot meanwhile.

        Raises:
            InvalidInput: this row can't be answered; no other is meant.
            SettingsError, UnknownModel, Unauthenticated: no row can be.
            JobFailed: no engine could serve.
        """


# Opens a task for a process.
OpenTask = Callable[[], AbstractAsyncContextManager[Task]]


@asynccontextmanager
async def open_task(job: Job, connect: Connect) -> AsyncIterator[Task]:
    """What a job file asks for, over a generator that ``connect`` opens."""
    async with connect() as generator:
        chat = Chat(job, generator, _lane(job, generator))
        yield LongText(job, chat) if job.task == "summarize" else chat


def _lane(job: Job, generator: JobBackend) -> Places:
    """This process' places. Jobs may have one name, but no two write to one output."""
    output = hashlib.blake2b(job.output.path.encode(), digest_size=8).hexdigest()
    most = None if job.rows_in_flight is None else max(1, job.rows_in_flight // job.generate_processes)
    return generator.lane(job.model, f"{job.name}-{output}", most, max(1, FIXED_ROWS // job.generate_processes))


class Chat:
    """One request a row."""

    def __init__(self, job: Job, generator: RowBackend, slots: Places) -> None:
        self.prompt: Prompt = prompt_of(job)
        self.columns = self.prompt.columns
        self.extra_columns = added_columns(job)
        self.generator = generator
        self.slots = slots
        self.ask = Asker(job.retry_s, lambda: slots.alive_s, self._probe)
        self._job = job

    @property
    def starved(self) -> bool:
        return self.slots.starved

    def prefix(self, row: Row) -> str:
        return "\0".join(f"{message['role']}\0{message['content']}" for message in self.prompt.messages(row))

    async def answer(self, row: Row, request_id: str) -> Answer:
        job = self._job
        request = self._request(self.prompt.messages(row), _sampling_of(job, row), request_id)
        generation = await self.ask(request_id, partial(self.generator.generate, request))
        outputs, usage = sorted(generation.outputs, key=lambda output: output.index), generation.usage
        output = outputs[0]
        return Answer(
            output.text,
            output.finish_reason,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else sum(len(each.token_ids) for each in outputs),
            added_values(job, outputs) if job.task != "summarize" else (),
        )

    async def _probe(self) -> None:
        sampling = replace(self._job.sampling, max_tokens=1, min_tokens=0, n=1)
        request = self._request(PROBE, sampling, f"{self._job.name}-probe-{uuid.uuid4().hex[:8]}")
        await self.generator.generate(request, deadline_s=PROBE_S)

    def _request(self, messages: Messages, sampling: Sampling, request_id: str) -> GenerationRequest:
        job = self._job
        return GenerationRequest(
            model=job.model,
            messages=messages,
            sampling=sampling,
            priority=Priority.BATCH,
            request_id=request_id,
            structured_output=job.structured_output.asked() if job.structured_output else None,
            tools=list(job.tools) if job.tools else None,
            tool_choice=job.tool_choice,
            chat_template_kwargs=job.chat_template_kwargs,
        )


def _sampling_of(job: Job, row: Row) -> Sampling:
    """The job's, with what the row has of its own.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """
    own = {name: row[column] for name, column in job.input.columns.sampling.items() if row[column] is not None}
    for name, value in own.items():
        # Where a column of whole numbers has nulls, some tools make floats of it.
        if isinstance(value, float) and value.is_integer() and name in WHOLE_NUMBERS:
            own[name] = int(value)
    return replace(job.sampling, **own) if own else job.sampling


class LongText:
    """A summary of a text of any length: one request where it fits into the context, else a tree of them."""

    def __init__(self, job: Job, chat: Chat) -> None:
        settings = job.summary or Summary()
        (column,) = chat.columns
        self.columns: tuple[str, ...] = chat.columns
        self.extra_columns = chat.extra_columns
        self.ask = chat.ask
        self.slots = chat.slots
        self._chat = chat
        self._summarizer = Summarizer(
            chat.generator,
            chat.slots,
            chat.ask,
            model=job.model,
            sampling=job.sampling,
            template_kwargs=job.chat_template_kwargs,
            settings=settings,
            whole=lambda text: chat.prompt.messages({column: text}),
        )

    @property
    def starved(self) -> bool:
        return self.slots.starved

    def prefix(self, row: Row) -> str:
        return self._chat.prefix(row)

    async def answer(self, row: Row, request_id: str) -> Answer:
        (column,) = self.columns
        # Refuses what is no text before its tokens are counted.
        self._chat.prompt.messages(row)
        if await self._summarizer.fits(row[column]):
            answer = await self._chat.answer(row, request_id)
            return replace(answer, extra=(None,) * len(self.extra_columns))
        # The tree's calls take slots themselves, the one that the row holds among them.
        self.slots.release()
        try:
            tree = await self._summarizer.summarize(row[column], request_id)
        finally:
            # It has nothing to ask any more, and is about to give it back.
            self.slots.take()
        return Answer(
            tree.root.summary,
            tree.root.finish_reason,
            tree.prompt_tokens,
            tree.completion_tokens,
            (tree.to_json(),) if self.extra_columns else (),
        )
