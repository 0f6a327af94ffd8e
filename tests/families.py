"""Processes below another one, some of which end while one looks."""

from __future__ import annotations

import contextlib

import psutil


def words_below(pid: int) -> dict[psutil.Process, list[str]]:
    """Those that live, with their command lines; none where the one above has ended."""
    below = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
    words = {process: _words_of(process) for process in below}
    return {process: said for process, said in words.items() if said}


def titled_below(pid: int, part: str) -> list[psutil.Process]:
    """Those whose titles have the part."""
    return [process for process, words in words_below(pid).items() if part in " ".join(words)]


def title_of(process: psutil.Process) -> str:
    """Its command line; empty if it has ended."""
    return " ".join(_words_of(process))


def _words_of(process: psutil.Process) -> list[str]:
    # A zombie, too, is said to be none.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []
