"""What the one who waits sees: a bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from hycluster.batch.output.record import Totals
from hycluster.terminal import printable

LINE_EVERY_S = 5.0
BAR_EVERY_S = 0.5
# What a job says that the engines have no time for. It has not failed, and goes on by itself.
WAITING = "waiting: online traffic"


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What one run of a job has done so far, committed or not; what processes say of themselves adds up.

    Attributes:
        done: rows that are through, and their tokens.
        in_flight: rows in the engines now.
        parked: those of them for which the engines have no time, because they serve online requests.
        processes: those that feed the engines and have begun.
        retries: calls made again because an engine failed.
        reasons: quarantined rows by ``error_type``.
    """

    done: Totals = field(default_factory=Totals)
    in_flight: int = 0
    retries: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    parked: int = 0
    processes: int = 0

    @property
    def waiting(self) -> bool:
        """It gets nothing of the engines' time now: online requests need it."""
        return 0 < self.parked == self.in_flight

    def __add__(self, other: RunProgress) -> RunProgress:
        return RunProgress(
            self.done + other.done,
            self.in_flight + other.in_flight,
            self.retries + other.retries,
            dict(Counter(self.reasons) + Counter(other.reasons)),
            self.parked + other.parked,
            self.processes + other.processes,
        )


class JobProgress:
    """Run as a Ray actor: what each generate process has done so far, by its own last word."""

    def __init__(self) -> None:
        self._said: dict[str, RunProgress] = {}

    def report(self, process: str, progress: RunProgress) -> None:
        self._said[process] = progress

    def total(self) -> RunProgress:
        return sum(self._said.values(), RunProgress())


class Reporter:
    """Shows a job's progress from a thread of its own, until the ``with`` block ends.

    Args:
        rows: of the whole input.
        earlier: rows that an earlier run of the job committed.
        poll: what this run has done so far; called about twice a second.
    """

    def __init__(self, name: str, rows: int, earlier: int, poll: Callable[[], RunProgress], console: Console) -> None:
        self._name = name
        self._rows = rows
        self._earlier = earlier
        self._poll = poll
        self._console = console
        self._in_work_since_s: float | None = None
        self._stop = threading.Event()
        show = self._bar if console.is_terminal else self._lines
        self._thread = threading.Thread(target=show, name="batch-report", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def in_work_s(self) -> float:
        """Seconds since the first row was seen in the engines: what rates are of while the job runs."""
        return time.monotonic() - self._in_work_since_s if self._in_work_since_s is not None else 0.0

    def _bar(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=self._console) as progress:
            bar = progress.add_task(printable(self._name), total=self._rows, completed=self._earlier, rates="")
            while True:
                last = self._stop.wait(BAR_EVERY_S)
                rows, rates = self._state()
                progress.update(bar, completed=rows, rates=rates)
                if last:
                    return

    def _lines(self) -> None:
        told_s = time.monotonic()
        while not self._stop.wait(min(BAR_EVERY_S, LINE_EVERY_S)):
            rows, rates = self._state()
            if time.monotonic() - told_s < LINE_EVERY_S:
                continue
            told_s = time.monotonic()
            self._console.print(f"{self._name}: {rows}/{self._rows} rows, {rates}", highlight=False, soft_wrap=True)

    def _state(self) -> tuple[int, str]:
        progress = self._poll()
        now = progress.done
        if self._in_work_since_s is None and (progress.in_flight or now.rows):
            self._in_work_since_s = time.monotonic()
        seconds = max(self.in_work_s, BAR_EVERY_S)
        # A shard that was done twice was counted twice; the bar must not pass its end.
        rows = min(self._rows, self._earlier + now.rows)
        if self._in_work_since_s is None:
            # A rate of nothing would look like a job that hangs.
            stage = "opening a gateway" if progress.processes else "a process for the job's rows"
            return rows, f"starting: {stage}, no row has reached an engine yet"
        rate = now.rows / seconds
        eta = duration((self._rows - rows) / rate) if rate else "?"
        quarantined = f", {now.quarantined} quarantined" if now.quarantined else ""
        retries = f", {progress.retries} retries" if progress.retries else ""
        rates = f"{per_second(rate)} rows/s, {per_second(now.completion_tokens / seconds)} tokens/s, ETA {eta}"
        waiting = f", {WAITING}" if progress.waiting else ""
        return rows, f"{rates}{quarantined}{retries}{waiting}"


def print_totals(
    console: Console, title: str, all_time: Totals, this_run: Totals, seconds: float, in_work_s: float
) -> None:
    """Print the final table. Rates are of this run, while rows were in work; counts are of the whole output."""
    # Not the table's, which would cut a path at its own width.
    console.print(title, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rated = this_run.rows and in_work_s
    for label, value in (
        ("rows", f"{all_time.rows}"),
        ("of these quarantined", f"{all_time.quarantined}"),
        ("of these done earlier", f"{all_time.rows - this_run.rows}"),
        ("prompt tokens", f"{all_time.prompt_tokens}"),
        ("completion tokens", f"{all_time.completion_tokens}"),
        ("seconds", f"{seconds:.1f}"),
        ("of these in work", f"{in_work_s:.1f}"),
        ("rows/s", per_second(this_run.rows / in_work_s) if rated else "-"),
        ("tokens/s", per_second(this_run.completion_tokens / in_work_s) if rated else "-"),
    ):
        table.add_row(label, value)
    console.print(table)


def per_second(rate: float) -> str:
    """A rate; of one that is small its first two digits, for what is slow does not stand still."""
    digits = 1 if rate >= 0.95 or not rate else min(9, 1 - math.floor(math.log10(rate)))
    return f"{rate:.{digits}f}"


def duration(seconds: float) -> str:
    """As ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
