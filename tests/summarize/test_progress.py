from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from hycluster.batch.summaries.tree import Node
from hycluster.summarize import progress as progress_
from hycluster.summarize.progress import SummaryProgress, progress_shown

NODE = Node(0, 0, 0, 10, 0, (), "summary", "stop", 30, 5)


def test_calls_of_documents_that_are_not_cut_yet_are_estimated() -> None:
    progress = SummaryProgress(4)
    assert str(progress) == "0/4 files, cutting into parts"
    first, second = progress.watch(), progress.watch()
    first.planned(10)
    second.planned(20)
    assert progress.expected == 60
    first.planned(2)
    first.answered(NODE)
    assert str(progress).startswith("0/4 files, 1/64 calls, 35 tokens, ETA 0:")
    progress.finished = 4
    assert progress.expected == 32


def test_one_file_is_not_counted() -> None:
    assert str(SummaryProgress(1)) == "cutting into parts"


@pytest.mark.parametrize("terminal", [True, False])
async def test_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_, "LINE_EVERY_S", 0.02)
    monkeypatch.setattr(progress_, "BAR_EVERY_S", 0.02)
    said = io.StringIO()
    progress = SummaryProgress(1)
    async with progress_shown(progress, Console(file=said, force_terminal=terminal, width=120)):
        watch = progress.watch()
        watch.planned(3)
        watch.answered(NODE)
        await asyncio.sleep(0.3)
    assert "1/3 calls, 35 tokens, ETA" in said.getvalue()
    assert ("\x1b[" in said.getvalue()) is terminal
