"""What became of a job that was submitted: Ray's record of it, read as ``hycluster batch run`` meant it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from hycluster.batch.progress.terminal import duration
from hycluster.errors import JobFailed, SettingsError, TooManyQuarantined
from hycluster.submit.submission import NAME_KEY, OUTPUT_KEY

State = Literal["waiting", "running", "finished", "cancelled", "failed"]
_STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "STOPPED": "cancelled",
    "FAILED": "failed",
}
_RESUMES = "the same submit goes on where it stopped"
# What the command of a job exits with, as shells and as `batch run` have it.
_MEANINGS = {
    JobFailed.exit_code: f"failed; {_RESUMES}",
    SettingsError.exit_code: "refused: job, input or output; nothing was done",
    TooManyQuarantined.exit_code: "more rows quarantined than max_quarantined_fraction; see _quarantine/ in the output",
    127: "the cluster's image has no 'hycluster' command on its PATH",
}


class JobRecord(msgspec.Struct, frozen=True):
    """What Ray's job API tells of a job, as far as it is read here; times are milliseconds since the epoch."""

    status: Literal["PENDING", "RUNNING", "SUCCEEDED", "STOPPED", "FAILED"]
    submission_id: str | None = None
    job_id: str | None = None
    metadata: dict[str, str] | None = None
    message: str | None = None
    start_time: int | None = None
    end_time: int | None = None
    driver_exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    """One job, as the cluster knows it.

    Attributes:
        id: what ``submit`` printed.
        name, output: of the job; None if something else has submitted it.
        command_exit: what its command ended with; negative is a signal. None while it runs, and if it never began.
        started_at, ended_at: seconds since the epoch, by the cluster's clock.
        reason: why it failed, one line.
    """

    id: str
    state: State
    name: str | None = None
    output: str | None = None
    command_exit: int | None = None
    started_at: float | None = None
    ended_at: float | None = None
    reason: str | None = None

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def exit_code(self) -> int:
        """As ``batch run`` exits: 0 (also while nothing is wrong yet), 1 resumable, 2 refused, 3 quarantined."""
        if self.state == "failed" and self.command_exit in (SettingsError.exit_code, TooManyQuarantined.exit_code):
            return self.command_exit
        return JobFailed.exit_code if self.state in ("failed", "cancelled") else 0

    @property
    def meaning(self) -> str:
        """The state, and what to do about it."""
        if self.state == "cancelled":
            return f"cancelled; {_RESUMES}"
        if self.state != "failed":
            return self.state
        if self.command_exit is None:
            return f"failed in Ray, not by itself; {_RESUMES}"
        if self.command_exit < 0:
            return f"killed by signal {-self.command_exit}; {_RESUMES}"
        return _MEANINGS.get(self.command_exit, _MEANINGS[JobFailed.exit_code])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}

    def cells(self) -> list[tuple[str, str]]:
        """Label and value pairs for those who read."""
        known = [
            ("id", self.id),
            ("job", self.name),
            ("state", self.meaning),
            ("reason", self.reason),
            ("started", self.started),
            ("for", self.took),
            ("output", self.output),
        ]
        return [(label, value) for label, value in known if value]

    @property
    def started(self) -> str:
        if self.started_at is None:
            return ""
        return f"{datetime.fromtimestamp(self.started_at, UTC):%Y-%m-%d %H:%M:%S} UTC"

    @property
    def took(self) -> str:
        if self.started_at is None:
            return ""
        return duration(max(0.0, (self.ended_at or time.time()) - self.started_at))


def submitted(record: JobRecord) -> Submitted:
    """Read Ray's record of a job."""
    metadata = record.metadata or {}
    state = _STATES[record.status]
    return Submitted(
        id=record.submission_id or record.job_id or "",
        state=state,
        name=metadata.get(NAME_KEY),
        output=metadata.get(OUTPUT_KEY),
        command_exit=record.driver_exit_code,
        started_at=_seconds(record.start_time),
        ended_at=_seconds(record.end_time),
        reason=_reason(record.message or "") if state == "failed" else None,
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _reason(message: str) -> str | None:
    """Ray's message holds the end of the log; the command's own last word is the line that begins with ``error:``."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else lines[-1] if lines else None
