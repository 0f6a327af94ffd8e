from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
import ray
from rich.console import Console

from hycluster.batch.output.record import Totals
from hycluster.batch.progress import terminal as report
from hycluster.batch.progress.terminal import JobProgress, Reporter, RunProgress, per_second, print_totals
from hycluster.batch.run import _polled


def test_processes_say_totals_so_a_word_lost_or_said_twice_does_no_harm() -> None:
    progress = JobProgress()
    progress.report("a", RunProgress(Totals(1, 0, 10, 5), 4, 1))
    progress.report("a", RunProgress(Totals(3, 1, 30, 15), 4, 2, {"NullValue": 1}))
    progress.report("a", RunProgress(Totals(3, 1, 30, 15), 4, 2, {"NullValue": 1}, parked=4))
    progress.report("b", RunProgress(Totals(2, 1, 20, 10), 3, 0, {"NullValue": 1}))
    assert progress.total() == RunProgress(Totals(5, 2, 50, 25), 7, 2, {"NullValue": 2}, parked=4)
    # The other process has time for its rows.
    assert not progress.total().waiting


BUSY = RunProgress(Totals(10, 2, 0, 50), retries=3)


def shown(terminal: bool, monkeypatch: pytest.MonkeyPatch, said: RunProgress = BUSY) -> str:
    monkeypatch.setattr(report, "LINE_EVERY_S", 0.02)
    monkeypatch.setattr(report, "BAR_EVERY_S", 0.02)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160)
    with Reporter("job", 100, 40, lambda: said, console):
        time.sleep(0.2)
    return text.getvalue()


def test_what_counts_may_be_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error was a traceback amid the lines, and the end of them."""
    answers: list[RunProgress | Exception] = [
        RunProgress(in_flight=1),
        ray.exceptions.ActorUnavailableError("away", None),
        ray.exceptions.GetTimeoutError(),
        RunProgress(in_flight=2),
    ]

    def get(_: object, timeout: float) -> RunProgress:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    told: list[RunProgress] = []
    progress = SimpleNamespace(total=SimpleNamespace(remote=lambda: None))
    poll = _polled(progress, SimpleNamespace(tell=told.append))  # type: ignore[arg-type]
    assert [poll().in_flight for _ in range(4)] == [1, 1, 1, 2]
    assert [said.in_flight for said in told] == [1, 2]


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(False, monkeypatch).splitlines()
    assert len(lines) > 1
    assert lines[0].startswith("job: 50/100 rows, ")
    for what in (" rows/s, ", " tokens/s, ", "ETA 0:00:0", "2 quarantined", "3 retries"):
        assert what in lines[-1]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_before_the_first_row_is_asked_the_stage_is_told(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    assert "starting: a process" in shown(terminal, monkeypatch, RunProgress())
    text = shown(terminal, monkeypatch, RunProgress(processes=1))
    assert "starting: opening a gateway" in text
    assert "rows/s" not in text


def test_a_job_that_the_engines_have_no_time_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for parked, waits in ((4, True), (3, False)):
        said = RunProgress(Totals(10, 2, 0, 50), 4, retries=3, parked=parked)
        assert ("waiting: online traffic" in shown(False, monkeypatch, said)) == waits


@pytest.mark.parametrize(
    ("rate", "told"),
    [(0, "0.0"), (1234.56, "1234.6"), (0.96, "1.0"), (0.94, "0.94"), (0.0666, "0.067"), (0.0099, "0.0099")],
)
def test_a_slow_job_does_not_look_like_one_that_stands_still(rate: float, told: str) -> None:
    assert per_second(rate) == told


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(True, monkeypatch)
    assert "50/100" in text
    assert "━" in text


def test_what_took_no_time_has_no_rate() -> None:
    text = io.StringIO()
    print_totals(Console(file=text, width=80), "t", Totals(2, 2), Totals(2, 2), 9.0, 0.0)
    assert "rows/s │ -" in " ".join(text.getvalue().split()).replace("│ rows/s", "rows/s")


def test_the_table_counts_all_and_rates_this_run() -> None:
    text = io.StringIO()
    print_totals(Console(file=text, width=80), "t", Totals(100, 3, 1000, 500), Totals(60, 0, 600, 300), 9.0, 2.0)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.getvalue().splitlines()]
    for row in (
        ["rows", "100"],
        ["of these quarantined", "3"],
        ["of these done earlier", "40"],
        ["rows/s", "30.0"],
        ["tokens/s", "150.0"],
    ):
        assert row in cells
