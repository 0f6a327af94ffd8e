"""An API app that needs no engine, and JSONL to send to it."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hycluster.batch_api.lines import BatchEngines
from hycluster.batch_api.records import Batch, new_record_id
from hycluster.batch_api.store import Store
from hycluster.errors import HyclusterError, KillsReplicas
from hycluster.gateway.bulk import BulkLanes
from hycluster.ingress.errors import answer_error
from hycluster.ledger.account import account_now

ENDPOINT = "/v1/chat/completions"


def line(named: str, **changes: Any) -> str:
    request = {"custom_id": named, "method": "POST", "url": ENDPOINT, "body": {"model": "m", "prompt": named}}
    return json.dumps(request | changes)


def jsonl(count: int, **body: Any) -> str:
    return "".join(line(f"c{n}", body={"model": "m", "prompt": f"p{n}"} | body) + "\n" for n in range(count))


def submit(store: Store, text: str, *, window_s: int = 3600, **fields: Any) -> Batch:
    """What an ingress process does for an upload and a new batch."""
    file = store.add_file(io.BytesIO(text.encode()), "in.jsonl")
    now = int(time.time())
    given = {"endpoint": ENDPOINT, "completion_window": "1h", "created_at": now, "expires_at": now + window_s}
    batch = Batch.model_validate({"id": new_record_id("batch_"), "input_file_id": file.id, **given, **fields})
    store.add_batch(batch)
    return batch


def lines_of(store: Store, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    assert store.file(file_id).bytes
    return [json.loads(text) for text in b"".join(store.chunks(store.open_content(file_id))).splitlines()]


class StandIn:
    """Answers each prompt with itself, and does what ``statuses`` says before that.

    Attributes:
        statuses: by prompt, what it is answered the first times.
        asked: how often each prompt came in.
        bodies: the last body of each prompt.
        held: prompts that get no answer.
        answered: how many were answered with themselves.
        by_user: the same, by the ``user`` of the request.
        kills: prompts that replicas die of.
    """

    def __init__(self) -> None:
        self.statuses: dict[str, list[int]] = {}
        self.asked: Counter[str] = Counter()
        self.bodies: dict[str, dict[str, Any]] = {}
        self.held: set[str] = set()
        self.answered = 0
        self.by_user: Counter[str] = Counter()
        self.kills: set[str] = set()
        self.delay_s = 0.0
        self.aborted: set[str] = set()
        self.most_at_once = self._now = 0
        self.lanes = BulkLanes()
        self.app = Starlette(
            routes=[Route(ENDPOINT, self._answer, methods=["POST"])],
            exception_handlers={HyclusterError: answer_error},
        )

    async def connect(self) -> BatchEngines:
        return BatchEngines(self.app, lambda model, batch: self.lanes.lane(batch))

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["prompt"]
        self.asked[prompt] += 1
        self.bodies[prompt] = body
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.sleep(3600 if prompt in self.held else self.delay_s)
        except asyncio.CancelledError:
            self.aborted.add(prompt)
            raise
        finally:
            self._now -= 1
        if prompt in self.kills:
            raise KillsReplicas("this request was on 3 replicas in a row when they died")
        if self.statuses.get(prompt):
            status = self.statuses[prompt].pop(0)
            error = {"error": {"message": f"status {status}", "type": "x", "param": None, "code": status}}
            return JSONResponse(error, status, headers={"Retry-After": "0"})
        if (account := account_now.get()) is not None:
            # As the model's gateway does, whatever the line calls it.
            account.admit("m")
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
        choice = {"message": {"content": f"{prompt}\u2028!"}, "finish_reason": "stop"}
        self.answered += 1
        self.by_user[body.get("user", "")] += 1
        return JSONResponse({"id": "r", "choices": [choice], "usage": usage})
