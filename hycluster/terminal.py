"""What people read at a terminal, with nothing in it that the terminal would obey.

Names of columns and files, what a model wrote and what another process says may hold escape sequences, by which a
terminal renames its window, overwrites lines or types for its user; and square brackets, which ``rich`` would take for
its markup. All that commands print goes through here.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# What a command exits with that Ctrl-C has ended, as shells have it.
INTERRUPTED_EXIT = 130

# Of what is read by a program: a line is a line, however long.
UNBOUNDED_COLUMNS = 10_000

# Control characters other than newline and tab, what turns the direction of text around, and halves of surrogate pairs.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with what a terminal would obey as Python writes it: ``\x1b``."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def echo(message: object, *, err: bool = False, nl: bool = True) -> None:
    """Print for people, to standard output or error."""
    import typer

    typer.echo(printable(str(message)), err=err, nl=nl)


def shown_on(file: TextIO, text: str) -> str:
    """What is data, a model's text: for another program as it is, for a terminal printable."""
    return printable(text) if file.isatty() else text


def console(*, stderr: bool = False) -> Console:
    """For tables and bars: text is printed as it is, brackets and colons too.

    Where there is no terminal nothing is cut or folded, unless ``COLUMNS`` says how wide it is to be: rich takes 80.
    """
    from rich.console import Console

    class Literal(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    made = Literal(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = UNBOUNDED_COLUMNS
    return made


class PrintableFormatter(logging.Formatter):
    """For log lines at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
