"""Files and batches as the store keeps them and as callers see them.

The shapes are OpenAI's (https://platform.openai.com/docs/api-reference/batch and ``/files``). What is
stored of a batch has one writer each: the ingress process writes :class:`Batch` once and may add a wish to cancel;
the executor writes :class:`State`.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hycluster.auth.caller import Recorded
from hycluster.settings.base import Strict

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
Ending = Literal["completed", "cancelled", "expired"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
FINAL = frozenset({"failed", "completed", "expired", "cancelled"})

FILE_ID = re.compile(r"file-[0-9a-f]{36}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{36}")
_WINDOW = re.compile(r"([1-9][0-9]{0,5})(m|h|d)")
_WINDOW_UNIT_S = {"m": 60, "h": 3600, "d": 86400}
LONGEST_WINDOW_S = 30 * 86400


class Record(BaseModel):
    """What the store keeps as JSON. A later version may have added fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ExpiresAfter(Strict):
    """When a file is deleted: an hour to 30 days after it was made, as OpenAI has it."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


class NewBatch(Strict):
    """The body of ``POST /v1/batches``.

    Attributes:
        completion_window: minutes, hours or days, as in ``30m``, ``24h``, ``7d``; at most 30 days.
    """

    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_a_duration(cls, text: str) -> str:
        if not 0 < _seconds(text) <= LONGEST_WINDOW_S:
            raise ValueError(
                f"{text!r} is not allowed; must be minutes, hours or days, like '30m', '24h' or '7d', "
                f"at most {LONGEST_WINDOW_S // 86400} days"
            )
        return text

    @property
    def window_s(self) -> int:
        return _seconds(self.completion_window)


class StoredFile(Record):
    """A file that callers know. Its content never changes."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    expires_at: int | None = None
    caller: Recorded = None

    def shown(self) -> dict[str, Any]:
        """As the API tells it."""
        return {**self.model_dump(exclude={"caller"}), "object": "file", "status": "processed", "status_details": None}


class Batch(Record):
    """What was asked for; never changes. Its lines are asked as by its caller."""

    id: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    caller: Recorded = None


class LineError(Record):
    """Why a batch failed: one line of its input, or, without ``line``, all of it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchUsage(Record):
    """Tokens of all lines together."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def shown(self) -> dict[str, Any]:
        """As the API tells it."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


class State(Record):
    """How far a batch is.

    Attributes:
        ending: how it will end, as soon as that is settled; from then on nothing is asked any more.
        output_file_id, error_file_id: reserved when the batch ends; callers see them when it has ended, and only
            those that have lines.
        ended_at: when it got its final status.
        shard_lines: how its input is cut; settings may change while it runs.
        waiting: the engines have no time for it, because they serve online requests.
    """

    status: Status = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: tuple[LineError, ...] = ()
    ending: Ending | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    ended_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    model: str | None = None
    usage: BatchUsage | None = None
    shard_lines: int = 64
    waiting: bool = False


def batch_object(batch: Batch, state: State, cancelling_at: int | None) -> dict[str, Any]:
    """A batch as the API tells it."""
    status = state.status
    final = status in FINAL
    # One that has all its answers already runs to its end.
    if cancelling_at is not None and not final and state.ending in (None, "cancelled"):
        status = "cancelling"

    def ended(how: Status) -> int | None:
        return state.ended_at if status == how else None

    told = {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": state.model,
        "errors": {"object": "list", "data": [e.model_dump() for e in state.errors]} if state.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": status,
        "output_file_id": state.output_file_id if final else None,
        "error_file_id": state.error_file_id if final else None,
        "created_at": batch.created_at,
        "in_progress_at": state.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": state.finalizing_at,
        "completed_at": ended("completed"),
        "failed_at": ended("failed"),
        "expired_at": ended("expired"),
        "cancelling_at": cancelling_at,
        "cancelled_at": ended("cancelled"),
        "request_counts": {"total": state.total, "completed": state.completed, "failed": state.failed},
        "usage": state.usage.shown() if state.usage else None,
        "metadata": batch.metadata,
    }
    if state.waiting and not final:
        # Beyond OpenAI's shape, and only when there is something to say.
        told["waiting"] = "online traffic"
    return told


def new_record_id(prefix: Literal["file-", "batch_"]) -> str:
    """An id that can't be guessed, and by which records sort in the order in which they were made."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(12)}"


def _seconds(window: str) -> int:
    """Length of a completion window; 0 if it is none."""
    match = _WINDOW.fullmatch(window)
    return int(match[1]) * _WINDOW_UNIT_S[match[2]] if match else 0
