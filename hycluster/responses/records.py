"""A response as the store keeps it, as callers see it, and as the beginning of what is said next."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from hycluster.auth.caller import Recorded

RESPONSE_ID = re.compile(r"resp_([0-9a-f]{12})[0-9a-f]{24}")
FINAL_STATUSES = frozenset({"completed", "incomplete", "failed", "cancelled"})
# What can be gone on from.
ANSWERED = frozenset({"completed", "incomplete"})
# With which vLLM or this layer end a stream.
FINAL_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})

Item = dict[str, Any]


class StoredResponse(BaseModel):
    """What the store keeps as JSON. A later version may have added fields.

    Attributes:
        items: all that the model was told: what came before, and the request's own input.
        response: what callers see. Of one in the background: as it began; how it ended is a record of its own.
        asked: of one in the background, what vLLM's app was asked, for whoever has to ask anew.
        streamed: one in the background whose events are kept.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    items: list[Item]
    response: dict[str, Any]
    asked: dict[str, Any] | None = None
    streamed: bool = False
    caller: Recorded = None

    @property
    def conversation(self) -> list[Item]:
        """As input of the next request. vLLM trips over a message without content."""
        said = [item for item in self.response["output"] if item.get("type") != "message" or item.get("content")]
        return [*self.items, *said]


class EndedResponse(BaseModel):
    """How one in the background ended, with its events if it was streamed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    response: dict[str, Any]
    events: list[dict[str, Any]] = []


def new_response_id() -> str:
    """One that can't be guessed and says when it was made; by it responses sort."""
    return f"resp_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(12)}"


def made_at(response_id: str) -> float:
    """Seconds since the epoch; 0 for what is no id of ours."""
    match = RESPONSE_ID.fullmatch(response_id)
    return int(match[1], 16) / 1000 if match else 0.0


def as_items(given: Any) -> Any:
    """A request's ``input`` as items; what is neither text nor a list stays, for vLLM to refuse."""
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


def failed_response(response: Mapping[str, Any], message: str) -> dict[str, Any]:
    """The response, ended by an error."""
    return {**response, "status": "failed", "error": {"code": "server_error", "message": message}}
