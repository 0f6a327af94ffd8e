"""What becomes of one line: it is sent through the API's own app, in this process, at batch priority.

So a line is read, checked and answered exactly as if it had come in by the HTTP ingress. An answer of 200
is the line's result; any other that is the line's own fault goes, as it is, to the error file. That no
engine can serve, or that online traffic fills them, is never the line's fault: it is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from starlette.types import ASGIApp

from hycluster import errors
from hycluster.auth.caller import calling, recorded
from hycluster.batch.ask import FIRST_BACKOFF_S, Asker
from hycluster.batch.prompts import Row
from hycluster.batch.task import Answer
from hycluster.batch_api.records import Batch
from hycluster.batch_api.requests import BODY
from hycluster.core import Priority
from hycluster.errors import HyclusterError, InvalidInput, KillsReplicas, Overloaded, Unavailable
from hycluster.gateway.bulk import BulkLane
from hycluster.gateway.tiers import for_batch
from hycluster.ingress.errors import KIND_HEADER, SHOULD_RETRY, error_body
from hycluster.ingress.in_process import InProcessAnswer, post
from hycluster.ledger.account import not_in_ledger
from hycluster.retries import AsyncRetryingCaller

OK = 200
HEADERS = {"Content-Type": "application/json"}
# Come back later, in HTTP.
COME_BACK: dict[int, type[HyclusterError]] = {429: Overloaded, 502: Unavailable, 503: Unavailable, 504: Unavailable}
SERVER_ERROR = 500
# What fails inside is asked so often; then the answer stands.
ATTEMPTS = 3
# What the quarantine says of a line that was not asked.
NOT_RUN = "not run"
# Where the endpoints have their prompts.
PROMPTS = ("messages", "prompt", "input")
# Columns beside the usual ones; ``pool`` is the model that answered, also where the line names an adapter of it, or
# none. Later nobody could tell: the adapter may have been unloaded.
EXTRA = tuple(pa.field(name, pa.string()) for name in ("cached_tokens", "reasoning_tokens", "pool"))


class LineFailed(InvalidInput):
    """A line's answer is not 200. The message is JSON: ``status_code`` and ``body``."""

    status: int


class NotRun(InvalidInput):
    """The batch ended before this line was answered."""

    def __init__(self) -> None:
        super().__init__(NOT_RUN)


@dataclass(frozen=True, slots=True)
class BatchEngines:
    """What lines are asked of.

    Attributes:
        app: the API's app over all models.
        lane: by model and batch, the places that the batch's lines have in the model's engines; None if there is no
            such model.
    """

    app: ASGIApp
    lane: Callable[[str, str], BulkLane | None]


class LinesTask:
    """The task of a batch, as ``hycluster/batch/generate.py`` runs it.

    Args:
        in_flight: what lines of all batches hold while they are asked; None where nothing but the engines bounds them.
        open_lines: lines that are asked, or wait for a place in the engines.

    Attributes:
        completed, failed: lines that were answered with 200, and with anything else.
    """

    columns: tuple[str, ...] = (BODY,)
    extra_columns: tuple[pa.Field, ...] = EXTRA

    def __init__(
        self, engines: BatchEngines, batch: Batch, in_flight: asyncio.Semaphore | None, open_lines: int
    ) -> None:
        self._engines = engines
        self._batch = batch
        self._caller = recorded(batch.caller)
        self._in_flight = in_flight or contextlib.nullcontext()
        self._urgent_at: float | None = None
        # By model.
        self._lanes: dict[str, BulkLane] = {}
        self.slots = asyncio.Semaphore(open_lines)
        # The batch's window bounds how long it is tried.
        self.ask = Asker(retry_s=float("inf"))
        self._asking: set[asyncio.Task[Answer]] = set()
        self._stopped = False
        self.completed = self.failed = 0

    @property
    def starved(self) -> bool:
        """No engine that has lines of this batch has time for them: online requests need it."""
        held = [lane for lane in self._lanes.values() if lane.held]
        return bool(held) and all(lane.starved for lane in held)

    def hurry(self, urgent_at: float | None) -> None:
        """The batch would miss this deadline, its own, at its pace; None: it would not."""
        self._urgent_at = urgent_at
        for lane in self._lanes.values():
            lane.urgent_at = urgent_at

    def prefix(self, row: Row) -> str:
        """What the line's prompt begins with, behind its model."""
        body = json.loads(row[BODY])
        prompt = next((body[key] for key in PROMPTS if body.get(key)), "")
        return f"{body.get('model')}\0{json.dumps([body.get('instructions'), prompt], ensure_ascii=False)}"

    def stop(self) -> None:
        """Answer no more: requests in flight are aborted, all lines left are ``NotRun``."""
        self._stopped = True
        for asking in self._asking:
            asking.cancel()

    async def answer(self, row: Row, request_id: str) -> Answer:
        """The response's body as ``output``.

        Raises:
            LineFailed, NotRun
            InvalidInput: it was given up.
        """
        if self._stopped:
            raise NotRun
        asking = asyncio.create_task(self._answer(json.loads(row[BODY]), request_id))
        self._asking.add(asking)
        try:
            answer = await asking
        except InvalidInput:
            self.failed += 1
            raise
        except asyncio.CancelledError:
            # Ours, or that of whoever waits for this line.
            if self._stopped and asking.cancelled():
                raise NotRun from None
            raise
        finally:
            self._asking.discard(asking)
            asking.cancel()
        self.completed += 1
        return answer

    async def _answer(self, body: dict[str, Any], request_id: str) -> Answer:
        for key in ("stream", "background"):
            if body.get(key):
                message = f"{key}: {body[key]!r} is not allowed in a batch; must be false"
                raise failed(400, error_body(400, message, InvalidInput.openai_type, key))
        body["priority"] = int(Priority.BATCH)
        again = AsyncRetryingCaller(
            attempts=ATTEMPTS, timeout=None, wait_initial=FIRST_BACKOFF_S, wait_jitter=FIRST_BACKOFF_S
        )
        return await again(_failed_inside, self._settled, body, request_id)

    async def _settled(self, body: dict[str, Any], request_id: str) -> Answer:
        status, answer, pool = await self.ask(request_id, partial(self._post, body, request_id))
        if status != OK:
            raise failed(status, answer)
        return _answered(answer, pool)

    def _lane(self, model: Any) -> BulkLane | None:
        if not isinstance(model, str):
            # Whatever it is, it is refused.
            return None
        if model not in self._lanes:
            lane = self._engines.lane(model, self._batch.id)
            if lane is None:
                return None
            lane.urgent_at = self._urgent_at
            self._lanes[model] = lane
        return self._lanes[model]

    async def _post(self, body: dict[str, Any], request_id: str) -> tuple[int, Any, str]:
        """One attempt; status and body of the response, and the model that gave it.

        Raises:
            Overloaded, Unavailable: come back later.
            KillsReplicas: and don't come back with this.
        """
        # Only now: those that wait for one model's engines must not stand in the way of another's.
        headers = HEADERS | {"X-Request-Id": request_hash(request_id)}
        # Whose it is says also which adapter a name stands for.
        with calling(self._caller), not_in_ledger() as account, for_batch():
            async with self._lane(body.get("model")) or contextlib.nullcontext(), self._in_flight:
                response = await post(self._engines.app, self._batch.endpoint, json.dumps(body).encode(), headers)
        try:
            answer = json.loads(response.body)
        except ValueError:
            message = response.body[:500].decode(errors="replace") or f"the server answered {response.status}"
            answer = error_body(response.status, message, HyclusterError.openai_type)
        if response.headers.get(KIND_HEADER) == KillsReplicas.__name__:
            raise KillsReplicas(_message(answer))
        # What is used up for a day, or is more than is ever let in, does not change while it waits.
        if response.status in COME_BACK and response.headers.get(SHOULD_RETRY) != "false":
            raise _kind(response)(_message(answer), retry_after_s=_retry_after_s(response))
        return response.status, answer, account.pool


def request_hash(request_id: str) -> str:
    """The id of a line's request, in the answer and in the logs: the same line of the same batch has the same."""
    return hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()


def failed(status: int, body: Any) -> LineFailed:
    error = LineFailed(json.dumps({"status_code": status, "body": body}))
    error.status = status
    return error


def _failed_inside(error: Exception) -> bool:
    return isinstance(error, LineFailed) and error.status >= SERVER_ERROR


def _answered(answer: dict[str, Any], pool: str) -> Answer:
    usage = answer.get("usage") or {}
    inside = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    outside = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    choices = answer.get("choices") or [{}]
    return Answer(
        # ASCII: some readers of JSONL take U+2028 and its like for the end of a line.
        json.dumps(answer),
        choices[0].get("finish_reason"),
        # The two families of endpoints have names of their own for the same.
        usage.get("prompt_tokens") or usage.get("input_tokens") or 0,
        usage.get("completion_tokens") or usage.get("output_tokens") or 0,
        (str(inside.get("cached_tokens") or 0), str(outside.get("reasoning_tokens") or 0), pool),
    )


def _kind(response: InProcessAnswer) -> type[HyclusterError]:
    """The error that the app answered with; it may say more than the status."""
    kind = getattr(errors, response.headers.get(KIND_HEADER, ""), None)
    plain = COME_BACK[response.status]
    return kind if isinstance(kind, type) and issubclass(kind, plain) else plain


def _message(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else str(answer)


def _retry_after_s(response: InProcessAnswer) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (given := response.headers.get(name, "")).isdigit():
            return float(given) * unit_s
    return None
