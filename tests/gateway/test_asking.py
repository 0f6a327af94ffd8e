"""What is found of a request where several processes are asked, with stand-ins for the other processes."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.gateway import asking
from hycluster.observe.timelines import Question, Recorder


def told(request_id: str, started: str) -> dict[str, Any]:
    return {"id": request_id, "started": started}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        # Of several jobs' rows the latest; of one that is named, that one's.
        ("a.parquet#2", "new-a.parquet#2"),
        ("old-a.parquet#2", "old-a.parquet#2"),
        ("own-a.parquet#2", "own-a.parquet#2"),
    ],
)
async def test_which_row_is_meant(monkeypatch: pytest.MonkeyPatch, asked: str, found: str) -> None:
    others = [told("old-a.parquet#2", "2026-11-30T10:00"), told("new-a.parquet#2", "2026-11-30T12:00")]

    async def answers(_: Any, question: Question, *, until_found: bool) -> list[dict[str, Any]]:
        assert not until_found
        return [each for each in others if each["id"].endswith(str(question.request_id))]

    recorder = Recorder()
    row = recorder.begin("own-a.parquet#2", "row")
    monkeypatch.setattr(asking, "_asked", answers)
    monkeypatch.setattr(asking, "recorder", recorder)
    row.started = 1_764_489_600.0  # a year before
    there: Any = object()
    answer = await asking.timeline_of(there, asked)
    assert answer is not None
    assert answer["id"] == found
