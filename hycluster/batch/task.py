"""What a job does with one row: a chat with the model, or a tree of summaries where the text is too long for one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from hycluster.batch.ask import Asker, RowBackend
from hycluster.batch.job import Job, Summary
from hycluster.batch.prompts import TREE, Prompt, Row, prompt_of
from hycluster.batch.summaries.summarizer import Summarizer
from hycluster.core import GenerationRequest, Priority

Connect = Callable[[], AbstractAsyncContextManager[RowBackend]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished row. ``extra`` are the values of the task's ``extra_columns``."""

    output: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    extra: tuple[str | None, ...] = ()


class Task(Protocol):
    """Answers rows.

    Attributes:
        columns: the input columns that it reads.
        extra_columns: string columns that it adds to the usual ones.
        ask: makes its calls.
    """

    columns: tuple[str, ...]
    extra_columns: tuple[str, ...]
    ask: Asker

    async def answer(self, row: Row, request_id: str) -> Answer:
        """Answer one row, given the values of ``columns``. The row holds a slot meanwhile.

        Raises:
            InvalidInput: this row can't be answered; no other is meant.
            SettingsError, UnknownModel, Unauthenticated: no row can be.
            JobFailed: no engine could serve.
        """


# Opens a task for a process, given the slots that its rows hold while they are answered.
OpenTask = Callable[[asyncio.Semaphore], AbstractAsyncContextManager[Task]]


@asynccontextmanager
async def open_task(job: Job, connect: Connect, slots: asyncio.Semaphore) -> AsyncIterator[Task]:
    """What a job file asks for, over a generator that ``connect`` opens."""
    async with connect() as generator:
        chat = Chat(job, generator, Asker(job.retry_s))
        yield LongText(job, chat, slots) if job.task == "summarize" else chat


class Chat:
    """One request a row."""

    extra_columns: tuple[str, ...] = ()

    def __init__(self, job: Job, generator: RowBackend, ask: Asker) -> None:
        self.prompt: Prompt = prompt_of(job)
        self.columns = self.prompt.columns
        self.generator = generator
        self.ask = ask
        self._job = job

    async def answer(self, row: Row, request_id: str) -> Answer:
        request = GenerationRequest(
            model=self._job.model,
            messages=self.prompt.messages(row),
            sampling=self._job.sampling,
            priority=Priority.BATCH,
            request_id=request_id,
        )
        generation = await self.ask(request_id, partial(self.generator.generate, request))
        (output,), usage = generation.outputs, generation.usage
        return Answer(
            output.text,
            output.finish_reason,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else len(output.token_ids),
        )


class LongText:
    """A summary of a text of any length: one request where it fits into the context, else a tree of them."""

    def __init__(self, job: Job, chat: Chat, slots: asyncio.Semaphore) -> None:
        settings = job.summary or Summary()
        (column,) = chat.columns
        self.columns: tuple[str, ...] = chat.columns
        self.extra_columns: tuple[str, ...] = (TREE,) if settings.keep_tree else ()
        self.ask = chat.ask
        self._chat = chat
        self._slots = slots
        self._summarizer = Summarizer(
            chat.generator,
            slots,
            chat.ask,
            model=job.model,
            sampling=job.sampling,
            settings=settings,
            whole=lambda text: chat.prompt.messages({column: text}),
        )

    async def answer(self, row: Row, request_id: str) -> Answer:
        (column,) = self.columns
        # Refuses what is no text before its tokens are counted.
        self._chat.prompt.messages(row)
        if await self._summarizer.fits(row[column]):
            return await self._chat.answer(row, request_id)
        # The tree's calls take slots themselves, the one that the row holds among them.
        self._slots.release()
        try:
            tree = await self._summarizer.summarize(row[column], request_id)
        finally:
            await self._slots.acquire()
        return Answer(
            tree.root.summary,
            tree.root.finish_reason,
            tree.prompt_tokens,
            tree.completion_tokens,
            (tree.to_json(),) if self.extra_columns else (),
        )
