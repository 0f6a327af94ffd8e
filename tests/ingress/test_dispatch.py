"""Which model a request is for, over apps that say who they are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.ingress.dispatch import ModelDispatch
from tests.ingress.echoing import SERVED, dispatch, model_of


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress")


@pytest.mark.parametrize(
    ("body", "app"),
    [
        ('{"model": "a", "prompt": "x"}', "a"),
        ('{"prompt": "x", "model": "b"}', "b"),
        ('{"prompt": "x", "model": "c/d"}', "b"),
        ('{"model": ["b"]}', "a"),
        ('["b"]', "a"),
        ("{}", "a"),
        ("not json", "a"),
        ("", "a"),
    ],
)
async def test_the_model_in_the_body_decides(body: str, app: str) -> None:
    async with client(dispatch()) as http:
        for query in ("", "?model=", "?model=a" if app == "a" else "?other=a"):
            answer = await http.post(f"/v1/completions{query}", content=body)
            assert answer.json() == {"app": app, "body": body}


async def test_a_body_in_pieces() -> None:
    whole = json.dumps({"prompt": "x" * 1000, "model": "b"})

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(whole), 100):
            yield whole[start : start + 100].encode()

    async with client(dispatch()) as http:
        answer = await http.post("/v1/completions", content=pieces())
    assert answer.json() == {"app": "b", "body": whole}


async def test_after_the_body_the_app_hears_the_client_leave() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    messages = iter([{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await ModelDispatch({"a": app, "b": app}, model_of, lambda: SERVED)(scope, receive, send)
    assert heard == ["http.request", "http.disconnect"]


async def test_models_of_all() -> None:
    async with client(dispatch()) as http:
        answer = await http.get("/v1/models")
    assert answer.json() == {"object": "list", "data": [{"id": "a"}, {"id": "b"}]}


async def test_other_gets_go_to_the_first() -> None:
    async with client(dispatch()) as http:
        assert (await http.get("/metrics")).json()["app"] == "a"


@pytest.mark.parametrize(
    ("method", "path", "app"),
    [
        ("GET", "/v1/models/a", "a"),
        ("GET", "/v1/models/c/d", "b"),
        ("GET", "/v1/models/c%2Fd", "b"),
        ("GET", "/v1/responses/r?model=b", "b"),
        ("POST", "/sleep?level=1&model=b", "b"),
        ("POST", "/sleep?model=c/d", "b"),
    ],
)
async def test_what_has_no_body_names_its_model_in_its_address(method: str, path: str, app: str) -> None:
    async with client(dispatch()) as http:
        assert (await http.request(method, path)).json()["app"] == app


@pytest.mark.parametrize("models", [("a",), ("a", "b")], ids=["one model", "several"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models/none"), ("POST", "/sleep?model=none")])
async def test_nobody_answers_for_another(models: tuple[str, ...], method: str, path: str) -> None:
    async with client(dispatch(*models)) as http:
        answer = await http.request(method, path)
    assert answer.status_code == 404
    says = "model: 'none' is not served here; served are 'a', 'b', 'c/d'"
    assert answer.json()["error"] == {
        "message": says,
        "type": "NotFoundError",
        "param": None,
        "code": "model_not_found",
    }


async def test_an_unknown_model_is_unknown_whether_or_not_the_first_serves() -> None:
    async def unable(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("nobody is to ask it")

    app = ModelDispatch({"a": unable, "b": unable}, model_of, lambda: SERVED)
    async with client(app) as http:
        answer = await http.post("/v1/chat/completions", json={"model": "none"})
    assert (answer.status_code, answer.headers["x-hycluster-error"]) == (404, "UnknownModel")


async def test_where_there_are_several_a_control_route_has_to_be_told_which() -> None:
    async with client(dispatch()) as http:
        answer = await http.post("/sleep")
    assert answer.status_code == 400
    says = "model: must be named, by the query parameter 'model'; served are 'a', 'b'"
    assert answer.json()["error"]["message"] == says
    async with client(dispatch("a")) as http:
        assert (await http.post("/sleep")).json()["app"] == "a"
