"""What the one who waits for summaries sees: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from hycluster.batch.progress.terminal import duration
from hycluster.batch.summaries.summarizer import TreeWatch
from hycluster.batch.summaries.tree import Node

BAR_EVERY_S = 0.2
LINE_EVERY_S = 5.0


class SummaryProgress:
    """Adds up what all documents together have done so far. A call is a part or a merge.

    Attributes:
        documents: of the whole run.
        finished: of these, those that are through.
        tokens: read and written by the calls that were answered.
    """

    def __init__(self, documents: int) -> None:
        self.documents = documents
        self.finished = 0
        self.tokens = 0
        self.answered = 0
        self._planned = 0
        self._cut = 0
        self._begun_s: float | None = None

    def watch(self) -> TreeWatch:
        """For one document."""
        return _OfOne(self)

    def plan(self, calls: int, *, first: bool) -> None:
        """So many calls more, and whether they are the first of their document."""
        self._planned += calls
        self._cut += first
        # From here on calls are answered; what went before was reading and cutting.
        self._begun_s = self._begun_s or time.monotonic()

    @property
    def expected(self) -> int:
        """Calls in all: those known of, and as many on average for each document that is not cut yet."""
        uncut = max(0, self.documents - self.finished - self._cut) if self._cut else 0
        return self._planned + round(uncut * self._planned / max(1, self._cut))

    @property
    def eta(self) -> str:
        """Time left if the rest goes like what was done; ``?`` before the first answer."""
        if not self.answered or self._begun_s is None:
            return "?"
        return duration((time.monotonic() - self._begun_s) / self.answered * (self.expected - self.answered))

    def __str__(self) -> str:
        files = f"{self.finished}/{self.documents} files, " if self.documents > 1 else ""
        if not self._cut:
            return f"{files}cutting into parts"
        return f"{files}{self.answered}/{self.expected} calls, {self.tokens} tokens, ETA {self.eta}"


class _OfOne(TreeWatch):
    def __init__(self, progress: SummaryProgress) -> None:
        self._progress = progress
        self._first = True

    def planned(self, calls: int) -> None:
        self._progress.plan(calls, first=self._first)
        self._first = False

    def answered(self, node: Node) -> None:
        self._progress.answered += 1
        self._progress.tokens += node.prompt_tokens + node.completion_tokens


@asynccontextmanager
async def progress_shown(progress: SummaryProgress, console: Console) -> AsyncIterator[None]:
    """Show it until the ``with`` block ends."""
    showing = asyncio.create_task(_bar(progress, console) if console.is_terminal else _lines(progress, console))
    try:
        yield
    finally:
        showing.cancel()
        with suppress(asyncio.CancelledError):
            await showing


async def _bar(progress: SummaryProgress, console: Console) -> None:
    columns = BarColumn(bar_width=16), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    # A summary that is printed meanwhile goes above the bar, unless it goes elsewhere.
    with Bar(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(str(progress), total=None)
        while True:
            bar.update(task, description=str(progress), completed=progress.answered, total=progress.expected or None)
            await asyncio.sleep(BAR_EVERY_S)


async def _lines(progress: SummaryProgress, console: Console) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        console.print(str(progress), highlight=False, soft_wrap=True)
