"""What others wrote is shown, and not obeyed by the terminal or by rich."""

from __future__ import annotations

import ast
import io
import logging
import sys
from pathlib import Path

import pytest
from rich.table import Table

import hycluster
from hycluster import terminal
from hycluster.batch.output.record import Totals
from hycluster.batch.progress.terminal import print_totals
from hycluster.batch.summaries.tree import Node, Tree
from hycluster.summarize.output import Summarized, SummaryOutput
from hycluster.terminal import PrintableFormatter, echo, printable

# Renames the window, and goes on in red.
ODD = "\x1b]0;mine\x07\x1b[31mred"
SHOWN = r"\x1b]0;mine\x07\x1b[31mred"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Grüße, 你好, 🙂", "Grüße, 你好, 🙂"),
        (ODD, SHOWN),
        ("over\rwritten", r"over\rwritten"),
        ("of Windows\r\n", "of Windows\n"),
        ("\x9b31m", r"\x9b31m"),
        ("\x7f\x00\x08", r"\x7f\x00\x08"),
        ("exe.\u202egpj", r"exe.\u202egpj"),
        ("half \ud800", r"half \ud800"),
        (r"\x1b", r"\x1b"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("err", [False, True])
def test_lines(capsys: pytest.CaptureFixture[str], err: bool) -> None:
    echo(ValueError(f"column {ODD}"), err=err)
    echo("no end", err=err, nl=False)
    assert capsys.readouterr()[err] == f"column {SHOWN}\nno end"


def test_tables_take_text_for_text(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal.console()
    console.width = 200
    table = Table(title=f"[/x] :smile: {ODD}")
    table.add_column(f"[/y]{ODD}")
    table.add_row(f"[bold]{ODD}")
    console.print(table)
    console.print(f"[/z] {ODD}")
    told = capsys.readouterr().out
    assert "\x1b" not in told
    for text in ("[/x] :smile:", "[/y]", "[bold]", "[/z]"):
        assert f"{text}" in told
    assert told.count(SHOWN) == 4


def test_the_totals_of_a_job_whose_output_has_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """rich raised an error after the job's ``_SUCCESS``."""
    print_totals(terminal.console(), f"out/[/x]{ODD}", Totals(1), Totals(1), 1.0, 1.0)
    assert f"out/[/x]{SHOWN}" in capsys.readouterr().out.splitlines()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_model_wrote_is_data_for_a_file_and_text_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree((Node(0, 0, 0, 3, None, (), ODD, "stop", 1, 1),))
    document = Summarized((f"{ODD}.txt",), "m", 3, 0.1, tree)
    for kind, expected in ((io.StringIO, ODD), (Screen, SHOWN)):
        for as_json in (False, True):
            out = kind()
            monkeypatch.setattr(sys, "stdout", out)
            SummaryOutput(None, as_json=as_json, headings=False, keep_tree=False).write(document)
            told = out.getvalue()
            assert as_json or told == f"{expected}\n"
            assert "\x1b" not in told or (kind is io.StringIO and not as_json)


def test_log_lines() -> None:
    record = logging.LogRecord("n", logging.ERROR, "p", 1, "column %s", (ODD,), None)
    assert PrintableFormatter("%(message)s").format(record) == f"column {SHOWN}"


def test_all_that_commands_print_goes_through_here() -> None:
    """No other module prints by itself, but for those that say why in the list."""
    others = {
        "__main__.py": {"print"},  # runs where nothing is installed; its own words
        "watchdog.py": {"print"},  # its own words
        "summarize/output.py": {"print"},  # data, with `shown_on`
    }
    house = Path(hycluster.__file__).parent
    for path in sorted(house.rglob("*.py")):
        if path.name == "terminal.py" and path.parent == house:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        found = {ast.unparse(call.func) for call in calls}
        found &= {"print", "typer.echo", "typer.secho", "click.echo", "click.secho", "Console"}
        assert found <= others.get(str(path.relative_to(house)), set()), f"{path}: use hycluster.terminal"
