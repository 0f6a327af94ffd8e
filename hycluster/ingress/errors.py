"""Errors as HTTP answers, in OpenAI's form: hycluster's own, and where vLLM's app has another form or no answer."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from hycluster.errors import (
    HyclusterError,
    InvalidInput,
    NotFound,
    Overloaded,
    QuotaExhausted,
    RequestFailed,
    Unauthenticated,
    kind_name,
)

logger = logging.getLogger(__name__)

# Which of hycluster's errors it is, for callers that treat them differently.
KIND_HEADER = "X-Hycluster-Error"
# What OpenAI's clients obey before all else.
SHOULD_RETRY = "X-Should-Retry"


async def answer_error(_: Request | None, error: Exception) -> JSONResponse:
    """One of hycluster's errors as FastAPI's exception handler answers it."""
    assert isinstance(error, HyclusterError)
    return openai_error(error.http_status, error.message, error.openai_type, headers_of(error), error.openai_code)


def headers_of(error: HyclusterError) -> dict[str, str]:
    """What an answer says of an error beside its body: which it is, and when to come again."""
    headers = {KIND_HEADER: kind_name(error)}
    if error.retry_after_s:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        headers["Retry-After-Ms"] = str(math.ceil(error.retry_after_s * 1000))
    if isinstance(error, QuotaExhausted) or error.metadata.get("never"):
        headers[SHOULD_RETRY] = "false"
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """What Starlette and FastAPI raise: no such path, no such method, a body that is none."""
    assert isinstance(error, HTTPException)
    kinds = {kind.http_status: kind.openai_type for kind in (NotFound, Overloaded)}
    kind = kinds.get(error.status_code, InvalidInput.openai_type)
    return openai_error(error.status_code, str(error.detail), kind, error.headers)


async def answer_generation_error(request: Request, error: Exception) -> JSONResponse:
    """A request that the engine gave up on: for vLLM a 500; here, as on the gRPC ingress, one that others don't
    share."""
    return await answer_error(request, RequestFailed(f"the engine ended this request early: {error}"))


async def answer_unreadable(request: Request, error: Exception) -> JSONResponse:
    """What vLLM's code trips over when it takes a request apart: fields that are allowed, but not together.

    It answers ``ValueError`` and ``TypeError`` with 400 itself; the engine's errors have kinds of their own.
    """
    logger.warning("%s: a request that vLLM can't take apart: %s", request.url.path, raised_at(error))
    message = f"body: can't be read as a request: {type(error).__name__}: {error}"
    return openai_error(InvalidInput.http_status, message, InvalidInput.openai_type)


def raised_at(error: BaseException) -> str:
    """Of which kind an error is, and where it was raised. For logs in the place of what it says: that may be of a
    prompt, as the key is that a message has not."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()


def openai_error(
    status: int, message: str, kind: str, headers: Mapping[str, str] | None = None, code: str | None = None
) -> JSONResponse:
    """An error as OpenAI's API tells it."""
    return JSONResponse(error_body(status, message, kind, code=code), status_code=status, headers=headers)


def error_body(
    status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}
