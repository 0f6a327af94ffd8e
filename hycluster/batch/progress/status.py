"""How far a job is, from the files of its output alone: from any machine, with or without its cluster.

A refresh reads the records that it has not read yet, so that it costs what is new, not what is done. Rates are
those of the shards committed last. What is not committed yet is what the job itself said last (progress.py).
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hycluster import terminal
from hycluster.batch.output.commit import OutputFolder
from hycluster.batch.output.lease import holder_has_died
from hycluster.batch.output.record import ShardRecord, Totals
from hycluster.batch.output.shard_set import ShardSet
from hycluster.batch.progress.progress_file import SILENT_S, STOPPED, ProgressEntry, last_word
from hycluster.batch.progress.terminal import LINE_EVERY_S, WAITING, RunProgress, duration, per_second
from hycluster.errors import SettingsError
from hycluster.storage import Folder, masked_line

# The shards that rates are taken from: the last so many, as far as they were committed within so long.
RECENT_SHARDS = 64
RECENT_S = 600.0
READERS = 16
# Records in flight at once.
WINDOW = 1024
TABLE_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Status:
    """One look at a job.

    Attributes:
        finished: whether the output is complete and committed.
        rows, shards: of the whole input; ``shards`` is None for an output that does not say.
        done: rows and tokens of the committed shards.
        rows_per_s, tokens_per_s: recent rates (tokens are completion tokens); None until they are known.
        eta_s: seconds until the last row at that rate; None if unknown or finished.
        committed_at: of the last shard, seconds since the epoch; None before the first.
        word: what the job said last; None if it has finished or said nothing yet.
    """

    output: str
    finished: bool
    rows: int
    shards: int | None
    shards_done: int
    done: Totals
    rows_per_s: float | None
    tokens_per_s: float | None
    eta_s: float | None
    committed_at: float | None
    word: ProgressEntry | None = None

    @property
    def rows_through(self) -> int:
        """Rows that have a result or are quarantined, those of shards that are not committed yet among them."""
        said = self.word.earlier_rows + self.word.progress.done.rows if self.word else 0
        # A shard that was done twice was counted twice.
        return min(self.rows, max(self.done.rows, said))

    @property
    def over(self) -> bool:
        """It has finished, or has said why it ended before that."""
        return self.finished or (self.word is not None and self.word.ended is not None)

    @property
    def waiting(self) -> bool:
        """It runs, and the engines have no time for it."""
        alive = self.word is not None and time.time() - self.word.told_at <= SILENT_S
        return alive and self.word is not None and self.word.progress.waiting

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "waiting": "online traffic" if self.waiting else None}

    def cells(self) -> list[tuple[str, str]]:
        """Label and value pairs for those who read."""
        shards = "?" if self.shards is None else str(self.shards)
        # Of this run, shards that are not committed yet among them.
        said = self.word.progress.done if self.word else Totals()
        return [
            ("state", self._state()),
            ("shards", f"{self.shards_done}/{shards}"),
            ("rows", f"{self.rows_through}/{self.rows}"),
            *(self._said() if self.word else []),
            ("quarantined", self._quarantined()),
            ("prompt tokens", str(max(self.done.prompt_tokens, said.prompt_tokens))),
            ("completion tokens", str(max(self.done.completion_tokens, said.completion_tokens))),
            ("rows/s", _rate(self.rows_per_s)),
            ("tokens/s", _rate(self.tokens_per_s)),
            ("ETA", "-" if self.eta_s is None or self.over else duration(self.eta_s)),
        ]

    def _said(self) -> list[tuple[str, str]]:
        progress = self.word.progress if self.word else RunProgress()
        in_flight = [] if self.word and self.word.ended else [("in flight", str(progress.in_flight))]
        return [("of these committed", str(self.done.rows)), *in_flight, ("retries", str(progress.retries))]

    def _quarantined(self) -> str:
        progress = self.word.progress if self.word else RunProgress()
        rows = max(self.done.quarantined, progress.done.quarantined)
        reasons = " ".join(f"{name} {count}" for name, count in sorted(progress.reasons.items()))
        return f"{rows} (this run: {reasons})" if reasons else str(rows)

    def _state(self) -> str:
        if self.finished:
            return "finished"
        age = "nothing committed yet"
        if self.committed_at is not None:
            age = f"last commit {duration(max(0.0, time.time() - self.committed_at))} ago"
        if self.word is None:
            return age if self.committed_at is None else f"not finished, {age}"
        if self.word.ended:
            return f"ended: {self.word.ended}"
        silent_s = max(0.0, time.time() - self.word.told_at)
        if silent_s > SILENT_S:
            return f"stopped, last heard of {duration(silent_s)} ago; its own command resumes it"
        return f"running, {WAITING}, {age}" if self.waiting else f"running, {age}"

    def line(self) -> str:
        return ", ".join(f"{label} {value}" for label, value in self.cells())


@dataclass(frozen=True, slots=True, order=True)
class _Recent:
    committed_at: float
    begun_at: float
    rows: int
    completion_tokens: int


class Watcher:
    """Looks at one output again and again.

    Raises:
        SettingsError: there is no job's output in the folder; so does ``look``.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._forget("")

    def look(self) -> Status:
        """Read what is new."""
        job = self._job()
        edition = str(job.get("edition", ""))
        if edition != self._edition:
            # Another job has begun here since the last look.
            self._forget(edition)
        # Before the records: what is finished has them all.
        finished = self._folder.exists("_SUCCESS")
        new = self._output.done() - self._seen
        word = None if finished else last_word(self._folder, edition)
        if word is not None and word.ended is None and holder_has_died(self._folder):
            # Killed, or ended by Ray: it could not say so itself.
            word = replace(word, ended=STOPPED)
        for record in self._records(new):
            self._seen.add(record.shard)
            self._done += Totals(record.rows, record.quarantined, record.prompt_tokens, record.completion_tokens)
            recent = _Recent(record.committed_at, record.begun_at, record.rows, record.completion_tokens)
            (heapq.heappushpop if len(self._recent) == RECENT_SHARDS else heapq.heappush)(self._recent, recent)
        rows = int(job["input"]["rows"])
        rates = recent_rates(self._recent)
        left = rows - self._done.rows
        return Status(
            # Without what a URI may carry along, such as keys.
            output=self._folder.root,
            finished=finished,
            rows=rows,
            shards=job["input"].get("shards"),
            shards_done=len(self._seen),
            done=self._done,
            rows_per_s=rates[0] if rates else None,
            tokens_per_s=rates[1] if rates else None,
            eta_s=left / rates[0] if rates and rates[0] and not finished else None,
            committed_at=max(self._recent).committed_at if self._recent else None,
            word=word,
        )

    def _job(self) -> dict[str, Any]:
        try:
            job = self._folder.read_json("_job.json")
            if job is None:
                raise SettingsError(f"OUTPUT: {self._folder.masked!r} holds no output of a job (there is no _job.json)")
            int(job["input"]["rows"])
        except SettingsError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"OUTPUT: {self._folder.masked!r}: _job.json can't be read: {masked_line(error)}"
            ) from None
        return job

    def _forget(self, edition: str) -> None:
        self._edition = edition
        # Anew, because it keeps to the edition that it saw first.
        self._output = OutputFolder(self._folder)
        self._seen = ShardSet()
        self._done = Totals()
        self._recent: list[_Recent] = []

    def _records(self, shards: Iterable[int]) -> Iterator[ShardRecord]:
        waiting = iter(shards)
        with ThreadPoolExecutor(READERS) as readers:
            while some := list(islice(waiting, WINDOW)):
                for record in readers.map(self._output.record, some):
                    # None: cleared away since it was listed.
                    if record is not None:
                        yield record


def recent_rates(recent: list[_Recent]) -> tuple[float, float] | None:
    """Rows/s and completion tokens/s of the shards committed last, None if no time has passed.

    From one commit to another, not from begin to commit: shards overlap. One shard alone has but its own time.
    """
    ordered = sorted(recent)
    ordered = [shard for shard in ordered if ordered[-1].committed_at - shard.committed_at <= RECENT_S]
    if not ordered:
        return None
    counted, begin = (ordered[1:], ordered[0].committed_at) if len(ordered) > 1 else (ordered, ordered[0].begun_at)
    seconds = ordered[-1].committed_at - begin
    if seconds <= 0:
        return None
    return sum(s.rows for s in counted) / seconds, sum(s.completion_tokens for s in counted) / seconds


def show_status(folder: Folder, *, follow: bool, as_json: bool, console: Console | None = None) -> None:
    """Print one look at a job, or look until it is over: a table on a terminal, lines elsewhere.

    Raises:
        SettingsError: there is no job's output in it.
    """
    console = console or terminal.console()
    watcher = Watcher(folder)
    now = watcher.look()
    if console.is_terminal and not as_json:
        with Live(_table(now), console=console, auto_refresh=False) as live:
            while follow and not now.over:
                time.sleep(TABLE_EVERY_S)
                now = watcher.look()
                live.update(_table(now), refresh=True)
        return
    while True:
        line = json.dumps(now.to_dict()) if as_json else now.line()
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        if now.over or not follow:
            return
        time.sleep(LINE_EVERY_S)
        now = watcher.look()


def _table(now: Status) -> Table:
    table = Table(title=now.output, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for label, value in now.cells():
        table.add_row(label, value)
    return table


def _rate(rate: float | None) -> str:
    return "-" if rate is None else per_second(rate)
