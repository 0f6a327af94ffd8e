"""Lines of a batch under limits: they wait, and fail once a quota is used up."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hycluster.batch_api.lines import BatchEngines, LineFailed, LinesTask
from hycluster.batch_api.records import Batch
from hycluster.batch_api.requests import BODY
from hycluster.errors import HyclusterError, QuotaExhausted, RateLimited
from hycluster.ingress.errors import answer_error

BATCH = Batch(
    id="batch_1", input_file_id="file-1", endpoint="/v1/completions", completion_window="1h", created_at=0, expires_at=1
)


def task(*refusals: HyclusterError) -> LinesTask:
    left = list(refusals)

    async def answer(request: Request) -> Response:
        if left:
            return await answer_error(request, left.pop(0))
        return JSONResponse({"choices": [{"finish_reason": "stop"}]})

    app = Starlette(routes=[Route(BATCH.endpoint, answer, methods=["POST"])])
    return LinesTask(BatchEngines(app, lambda *_: None), BATCH, None, 8)


ROW: Any = {BODY: json.dumps({"model": "m", "prompt": "p"})}


async def test_a_line_over_a_limit_waits() -> None:
    asked = task(*(RateLimited("requests_per_minute: reached", retry_after_s=0.01) for _ in range(5)))
    async with asyncio.timeout(30):
        await asked.answer(ROW, "r")
    assert (asked.completed, asked.failed) == (1, 0)


async def test_a_line_fails_that_is_more_than_is_ever_let_in() -> None:
    never = RateLimited("tokens_per_minute: a request for 9 is never let in")
    never.metadata = {"never": "true"}
    with pytest.raises(LineFailed) as failed:
        await task(never, never).answer(ROW, "r")
    assert json.loads(failed.value.message)["status_code"] == 429


async def test_a_line_fails_whose_quota_is_used_up() -> None:
    asked = task(QuotaExhausted("tokens_per_day: reached"))
    with pytest.raises(LineFailed) as failed:
        await asked.answer(ROW, "r")
    said = json.loads(failed.value.message)
    assert (said["status_code"], said["body"]["error"]["code"]) == (429, "insufficient_quota")
