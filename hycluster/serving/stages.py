"""What a start is at, for whoever runs ``hycluster serve``: a live list on a terminal, lines elsewhere.

One row for each model and one for the ingress, made of the same look as all that the command says. A replica that fails
says why in its model's row; as a line it is told by ``losses.py``, which goes on after the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from hycluster.app import deployment_name
from hycluster.directory.directory import Overview
from hycluster.directory.starts import PROCESS, TURN, StartingReplica
from hycluster.errors import one_line
from hycluster.pool_health import StartTrouble
from hycluster.serving.losses import CAN_NOT_START
from hycluster.serving.ray_state import Look
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.state.words import span
from hycluster.terminal import console, printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

INGRESS = "ingress"
MARKS = {"begins": ("…", "yellow"), "done": ("✓", "green"), "failed": ("✗", "red")}
# In the place of a stage's name; what is not here is told as it is.
WORDS = {
    TURN: "waits before it tries again",
    PROCESS: "process: is up",
    "weights": "weights: found or made ready",
    "engine": "engine: loads the weights and warms up",
}


@dataclass(frozen=True, slots=True)
class StageRow:
    """What one part of the service is at.

    Attributes:
        label: in words; a line is told when it changes.
        times: of the stages that are over, and of the one that runs.
    """

    name: str
    state: Literal["begins", "done", "failed"]
    label: str
    times: str = ""


def stage_rows(settings: Settings, look: Look, *, is_open: bool) -> Iterator[StageRow]:
    """The models' rows in the settings' order, then the ingress's."""
    overview = look.overview or Overview()
    for model in settings.models:
        yield _model_row(model, look, overview)
    if is_open:
        yield StageRow(INGRESS, "done", "open")
    elif any(overview.ready.values()) or overview.asleep:
        yield StageRow(INGRESS, "begins", "opens: loads the models' tokenizers and their API")
    else:
        yield StageRow(INGRESS, "begins", "waits for a model")


def _model_row(model: Model, look: Look, overview: Overview) -> StageRow:
    deployment = (look.deployments or {}).get(deployment_name(model))
    wanted = deployment.wanted if deployment else model.replicas.count
    ready, trouble = overview.ready.get(model.name, 0), overview.troubles.get(model.name)
    starting = overview.starting.get(model.name, ())
    if ready and ready >= wanted:
        return StageRow(model.name, "done", f"{ready} of {wanted} replicas serve")
    if model.name in overview.asleep or (model.sleeps and not wanted):
        return StageRow(model.name, "done", "sleeps; a request wakes it")
    if trouble is not None:
        return StageRow(model.name, "failed", _failed(trouble), _times(starting))
    serve = f"{ready} of {wanted} replicas serve; " if ready else ""
    if starting:
        # What all wait for is what the last one is at.
        last = min(starting, key=lambda each: len(each.stages))
        return StageRow(model.name, "begins", serve + WORDS.get(last.stage, last.stage), _times((last,)))
    message = deployment.message if deployment else ""
    if any(word in message for word in CAN_NOT_START):
        return StageRow(model.name, "begins", f"{serve}waits for a place: {one_line(message, 200)}")
    return StageRow(model.name, "begins", f"{serve}process: Ray starts it")


def _failed(trouble: StartTrouble) -> str:
    again = f"next try in {trouble.retry_in_s:.0f} s" if trouble.retry_in_s else "it is tried again"
    return f"{trouble.told()}; {again}"


def _times(starting: tuple[StartingReplica, ...]) -> str:
    return ", ".join(f"{stage.name} {span(stage.duration_s)}" for each in starting[:1] for stage in each.stages)


class StartDisplay:
    """Shows the rows while the block lasts.

    Args:
        say: prints a line, where there is no terminal.
        clock: seconds.
        live: whether there is a terminal to draw on; None looks.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
    ) -> None:
        self._settings = settings
        self._say = say
        self._clock = clock
        self._begun_s = clock()
        self._screen = console(stderr=True)
        self._draws = self._screen.is_terminal if live is None else live
        self._live: Live | None = None
        self._rows: dict[str, StageRow] = {}
        # By row, when it came to its label, and when it was done.
        self._since_s: dict[str, float] = {}
        self._times: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self._draws:
            from rich.live import Live

            # What is left is the last state, above which all that was said meanwhile stands.
            self._live = Live(console=self._screen, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that has nothing to do with the rows: above them, where they are drawn."""
        if self._live is None:
            self._say(line)
        else:
            self._screen.print(line, soft_wrap=True)

    def update(self, look: Look, *, is_open: bool) -> None:
        """There was a look."""
        now_s = self._clock()
        for row in stage_rows(self._settings, look, is_open=is_open):
            before = self._rows.get(row.name)
            self._rows[row.name] = row
            if row.times:
                self._times[row.name] = row.times
            if before is None or before.label != row.label:
                self._since_s[row.name] = now_s
                if self._live is None and row.state != "failed":
                    self._say(self._line(row, now_s))
        if self._live is not None:
            self._live.update(self._table(now_s), refresh=True)

    def _line(self, row: StageRow, now_s: float) -> str:
        times = f" ({self._times[row.name]})" if row.state == "done" and self._times.get(row.name) else ""
        return f"[{span(now_s - self._begun_s)}] {row.name}: {row.label}{times}"

    def _table(self, now_s: float) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for row in self._rows.values():
            mark, colour = MARKS[row.state]
            since = self._since_s[row.name]
            told = f"after {span(since - self._begun_s)}" if row.state == "done" else span(now_s - since)
            times = self._times.get(row.name, "")
            table.add_row(
                Text(mark, colour),
                Text(printable(row.name), "bold"),
                Text(printable(row.label), colour if row.state == "failed" else ""),
                Text(told, "dim"),
                Text(times, "dim"),
            )
        return table
