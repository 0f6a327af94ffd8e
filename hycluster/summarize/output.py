"""Where summaries go: text or JSON lines on standard output, JSON lines in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer

from hycluster.batch.summaries.tree import Tree
from hycluster.errors import SettingsError
from hycluster.terminal import shown_on


@dataclass(frozen=True, slots=True)
class Summarized:
    """One document: its tree, or why there is none.

    Attributes:
        files: what it was made of: one, unless several were taken together.
        characters: of its text.
        seconds: from reading it to its summary.
    """

    files: tuple[str, ...]
    model: str
    characters: int
    seconds: float
    tree: Tree | None = None
    error: str | None = None

    @property
    def parts(self) -> int:
        return sum(node.level == 0 for node in self.tree.nodes) if self.tree else 0

    def to_dict(self, *, keep_tree: bool) -> dict[str, Any]:
        """The fields of a JSON line."""
        named = {"file": self.files[0]} if len(self.files) == 1 else {"files": list(self.files)}
        if self.tree is None:
            return {**named, "error": self.error}
        root = self.tree.root
        line = {
            **named,
            "summary": root.summary,
            "finish_reason": root.finish_reason,
            "model": self.model,
            "characters": self.characters,
            "parts": self.parts,
            "merge_levels": root.level,
            "prompt_tokens": self.tree.prompt_tokens,
            "completion_tokens": self.tree.completion_tokens,
            "seconds": round(self.seconds, 3),
        }
        return {**line, "tree": self.tree.to_dict()} if keep_tree else line


class SummaryOutput:
    """Takes documents one by one; see :func:`open_output`."""

    def __init__(self, file: TextIO | None, *, as_json: bool, headings: bool, keep_tree: bool) -> None:
        self._file = file
        self._as_json = as_json
        self._headings = headings
        self._keep_tree = keep_tree
        self._written = False

    def write(self, document: Summarized) -> None:
        """To all places at once; a document without a summary is left out where text goes."""
        line = json.dumps(document.to_dict(keep_tree=self._keep_tree), ensure_ascii=False)
        if self._file:
            if not self._written:
                # Only now: what an earlier run left is kept if this one does not get as far.
                self._file.truncate(0)
                self._written = True
            print(line, file=self._file, flush=True)
        if self._as_json:
            print(shown_on(sys.stdout, line), flush=True)
        elif document.tree:
            if self._headings:
                heading = shown_on(sys.stdout, f"==> {', '.join(document.files)} <==")
                print(typer.style(heading, bold=True) if sys.stdout.isatty() else heading)
            summary = shown_on(sys.stdout, document.tree.root.summary.strip())
            print(summary, end="\n\n" if self._headings else "\n", flush=True)


@contextmanager
def open_output(path: Path | None, *, as_json: bool, headings: bool, keep_tree: bool) -> Iterator[SummaryOutput]:
    """Open the output; an existing file is replaced when the first document comes.

    Raises:
        SettingsError: the file can't be written.
    """
    if path is None:
        yield SummaryOutput(None, as_json=as_json, headings=headings, keep_tree=keep_tree)
        return
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--output: {path} can't be written: {error.strerror or error}") from None
    with file:
        yield SummaryOutput(file, as_json=as_json, headings=headings, keep_tree=keep_tree)
