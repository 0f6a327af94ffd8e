"""CORS and the form of errors, around an app that answers as it is told."""

from __future__ import annotations

import json

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from hycluster.ingress.errors import answer_unreadable, error_body
from hycluster.ingress.forms import in_form

ORIGIN = "https://page.example"


def client(app: ASGIApp, origins: tuple[str, ...] = ()) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(in_form(app, origins)), base_url="http://ingress")


async def test_logs_say_where_and_not_what(caplog: pytest.LogCaptureFixture) -> None:
    """A request that vLLM trips over, with what it tripped over in its words."""
    try:
        _ = dict[str, str]()["of a prompt"]
    except KeyError as error:
        said = await answer_unreadable(Request({"type": "http", "path": "/v1/x", "headers": []}), error)
    assert b"of a prompt" in bytes(said.body), "its caller hears it"
    assert "of a prompt" not in caplog.text.replace('dict[str, str]()["of a prompt"]', "")
    assert "KeyError" in caplog.text
    assert "test_forms.py" in caplog.text


def openais(status: int, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(status, "model: is wrong", "SomeError"), status_code=status, headers=headers)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_errors_below_messages_are_anthropics(path: str, status: int, kind: str) -> None:
    async with client(openais(status, {"retry-after": "3", "x-hycluster-error": "Overloaded"})) as caller:
        answer = await caller.post(path, json={})
    assert answer.status_code == status
    assert answer.json() == {"type": "error", "error": {"type": kind, "message": "model: is wrong"}}
    assert (answer.headers["retry-after"], answer.headers["x-hycluster-error"]) == ("3", "Overloaded")
    assert int(answer.headers["content-length"]) == len(answer.content)


async def test_what_is_no_error_of_theirs_is_left_alone() -> None:
    async with client(openais(400)) as caller:
        assert (await caller.post("/v1/chat/completions")).json() == json.loads(bytes(openais(400).body))
        assert (await caller.post("/v1/messages_of_another")).json()["error"]["type"] == "SomeError"
    async with client(JSONResponse({"type": "message"})) as caller:
        assert (await caller.post("/v1/messages")).json() == {"type": "message"}
    async with client(PlainTextResponse("no", status_code=500)) as caller:
        assert (await caller.post("/v1/messages")).json()["error"] == {"type": "api_error", "message": "no"}


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/messages"])
@pytest.mark.parametrize("status", [200, 404, 413, 503])
async def test_pages_of_other_origins_may_read_every_answer(path: str, status: int) -> None:
    async with client(openais(status), (ORIGIN,)) as caller:
        answer = await caller.get(path, headers={"Origin": ORIGIN})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"Retry-After", "Retry-After-Ms", "X-Should-Retry", "x-ratelimit-remaining-tokens"} <= {*exposed}
        stranger = await caller.get(path, headers={"Origin": "https://another.example"})
        assert "access-control-allow-origin" not in stranger.headers
        asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
        before = await caller.options(path, headers=asked)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, ORIGIN)


async def test_without_origins_in_the_settings_no_page_may() -> None:
    async with client(openais(200)) as caller:
        answer = await caller.get("/health", headers={"Origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]
