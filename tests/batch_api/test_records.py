from __future__ import annotations

from typing import Any

import pytest
from openai.types import Batch as TheirBatch
from openai.types import FileObject

from hycluster.batch_api.records import (
    BATCH_ID,
    FILE_ID,
    Batch,
    BatchUsage,
    NewBatch,
    State,
    StoredFile,
    batch_object,
    new_record_id,
)
from hycluster.errors import SettingsError
from hycluster.settings.read import validate

BATCH = Batch(
    id=new_record_id("batch_"),
    endpoint="/v1/completions",
    input_file_id="file-1",
    completion_window="1h",
    created_at=100,
    expires_at=3700,
)


def test_ids() -> None:
    ids = [new_record_id("batch_") for _ in range(100)]
    assert len(set(ids)) == 100
    assert all(BATCH_ID.fullmatch(name) for name in ids)
    assert FILE_ID.fullmatch(new_record_id("file-"))
    moments = [name[6:18] for name in ids]
    assert moments == sorted(moments)


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86400), ("30m", 1800), ("7d", 604800), ("30d", 2592000)])
def test_windows(window: str, seconds: int) -> None:
    asked = NewBatch(input_file_id="f", endpoint="/v1/completions", completion_window=window)
    assert asked.window_s == seconds


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"completion_window": "24"}, "completion_window: '24' is not allowed; must be minutes, hours or days"),
        ({"completion_window": "0h"}, "'0h' is not allowed"),
        ({"completion_window": "31d"}, "at most 30 days"),
        ({"completion_window": "1w"}, "'1w' is not allowed"),
        ({"endpoint": "/v1/images"}, "endpoint: '/v1/images' is not allowed"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds: 60"),
        ({"windows": "1h"}, "windows: unknown key"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_a_wrong_new_batch_is_refused_by_its_field(change: dict[str, Any], says: str) -> None:
    good = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"}
    validate(NewBatch, good, "body")
    with pytest.raises(SettingsError, match=says):
        validate(NewBatch, good | change, "body")


@pytest.mark.parametrize(
    ("state", "cancelling_at", "status"),
    [
        (State(), None, "validating"),
        (State(), 5, "cancelling"),
        (State(status="in_progress"), 5, "cancelling"),
        (State(status="finalizing", ending="cancelled"), 5, "cancelling"),
        # Too late: every line has its answer.
        (State(status="finalizing", ending="completed"), 5, "finalizing"),
        (State(status="completed", ending="completed"), 5, "completed"),
        (State(status="cancelled", ending="cancelled"), 5, "cancelled"),
    ],
)
def test_the_status_that_callers_see(state: State, cancelling_at: int | None, status: str) -> None:
    assert batch_object(BATCH, state, cancelling_at)["status"] == status


def test_files_are_shown_at_the_end_only() -> None:
    state = State(status="finalizing", ending="completed", output_file_id="file-o", ended_at=None)
    assert batch_object(BATCH, state, None)["output_file_id"] is None
    ended = state.model_copy(update={"status": "completed", "ended_at": 9})
    seen = batch_object(BATCH, ended, None)
    assert (seen["output_file_id"], seen["completed_at"], seen["failed_at"]) == ("file-o", 9, None)


def test_the_official_client_knows_every_field() -> None:
    state = State(status="completed", ended_at=9, usage=BatchUsage(input_tokens=3, output_tokens=2))
    seen = TheirBatch.model_validate(batch_object(BATCH, state, None), strict=True)
    assert not seen.model_extra
    assert seen.usage is not None
    assert seen.usage.total_tokens == 5
    file = StoredFile(id="file-1", bytes=1, created_at=1, filename="x", purpose="batch")
    assert not FileObject.model_validate(file.shown(), strict=True).model_extra
