from __future__ import annotations

from typing import Any

import msgspec
import pytest
from ray.job_submission import JobDetails

from hycluster.submit.submitted import JobRecord, submitted

LOG_TAIL = """Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):
error: input.path: 's3://bucket/in' is empty
"""


def record(status: str, **more: Any) -> JobRecord:
    """As Ray tells it, which tells of more."""
    told = JobDetails(type="SUBMISSION", submission_id="a-1", status=status, entrypoint="", **more)
    return msgspec.json.decode(told.model_dump_json(), type=JobRecord)


@pytest.mark.parametrize(
    ("status", "command_exit", "exit_code", "meaning"),
    [
        ("PENDING", None, 0, "waiting"),
        ("RUNNING", None, 0, "running"),
        ("SUCCEEDED", 0, 0, "finished"),
        ("STOPPED", None, 1, "cancelled; the same submit goes on"),
        ("FAILED", 1, 1, "failed; the same submit goes on"),
        ("FAILED", 2, 2, "refused"),
        ("FAILED", 3, 3, "more rows quarantined"),
        ("FAILED", 127, 1, "no 'hycluster' command"),
        ("FAILED", -9, 1, "killed by signal 9; the same submit goes on"),
        ("FAILED", None, 1, "failed in Ray, not by itself; the same submit goes on"),
    ],
)
def test_states_are_told_as_batch_run_exits(
    status: str, command_exit: int | None, exit_code: int, meaning: str
) -> None:
    job = submitted(record(status, driver_exit_code=command_exit))
    assert job.exit_code == exit_code
    assert meaning in job.meaning
    assert job.ended == (status not in ("PENDING", "RUNNING"))


def test_a_failure_says_the_command_s_own_word() -> None:
    job = submitted(record("FAILED", driver_exit_code=2, message=LOG_TAIL))
    assert job.reason == "input.path: 's3://bucket/in' is empty"
    ray_s = submitted(record("FAILED", message="Job supervisor actor died:\n  the node is gone\n"))
    assert ray_s.reason == "the node is gone"
    assert submitted(record("RUNNING", message="Job is currently running.")).reason is None


def test_what_is_known_is_shown() -> None:
    metadata = {"hycluster_job": "nightly", "hycluster_output": "s3://bucket/out"}
    job = submitted(record("SUCCEEDED", start_time=1_700_000_000_000, end_time=1_700_000_090_000, metadata=metadata))
    assert dict(job.cells()) == {
        "id": "a-1",
        "job": "nightly",
        "state": "finished",
        "started": "2023-11-14 22:13:20 UTC",
        "for": "0:01:30",
        "output": "s3://bucket/out",
    }
    told = job.to_dict()
    assert (told["exit_code"], told["started_at"], told["name"]) == (0, 1_700_000_000, "nightly")
    # Somebody else's job, through the same API.
    assert [label for label, _ in submitted(record("RUNNING")).cells()] == ["id", "state"]
