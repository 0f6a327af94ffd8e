"""What apps of our own that speak OpenAI's API share: how they read a body, list, and refuse."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from hycluster.errors import HyclusterError, InvalidInput, shown
from hycluster.ingress.errors import answer_error, openai_error

MAX_JSON_BYTES = 1 << 20


def json_api() -> FastAPI:
    """An app without routes, whose errors are in OpenAI's form."""
    app = FastAPI(title="hycluster", openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(HyclusterError, answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_wrong_query)
    return app


async def json_body(request: Request, *, may_be_empty: bool = False) -> dict[str, Any]:
    """
    Raises:
        InvalidInput: the body is no JSON object.
        HTTPException: 413, it is too large.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise HTTPException(413, f"body: is over the limit of {MAX_JSON_BYTES} bytes")
    if not body and may_be_empty:
        return {}
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidInput("body: is not JSON") from None
    if not isinstance(asked, dict):
        raise InvalidInput(f"body: must be a JSON object, not {type(asked).__name__}")
    return asked


def list_page(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list, given one more than it holds if there is one."""
    data = found[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > limit,
    }


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return openai_error(error.status_code, str(error.detail), InvalidInput.openai_type, error.headers)


async def _answer_wrong_query(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"][1:]))
    message = f"{field}: {shown(problem['input'])} is not allowed: {problem['msg']}"
    return openai_error(InvalidInput.http_status, message, InvalidInput.openai_type)
