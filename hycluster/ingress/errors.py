"""hycluster's errors as HTTP answers, in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse

from hycluster import errors
from hycluster.errors import HyclusterError

# Which of hycluster's errors it is, for callers that treat them differently.
KIND_HEADER = "X-Hycluster-Error"


async def answer_error(_: Request | None, error: Exception) -> JSONResponse:
    """One of hycluster's errors as FastAPI's exception handler answers it."""
    assert isinstance(error, HyclusterError)
    kind = next(known for known in type(error).__mro__ if known.__module__ == errors.__name__)
    headers = {KIND_HEADER: kind.__name__}
    if error.retry_after_s:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return openai_error(error.http_status, error.message, error.openai_type, headers)


def openai_error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's API tells it."""
    return JSONResponse(error_body(status, message, kind), status_code=status, headers=headers)


def error_body(status: int, message: str, kind: str, param: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
