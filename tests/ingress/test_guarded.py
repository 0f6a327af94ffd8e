"""The HTTP ingress's door, driven by the official clients; echoing apps stand in the place of models' apps."""

from __future__ import annotations

import asyncio
import base64
import importlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.auth.api_key import digest, new_key
from hycluster.auth.caller import current_caller
from hycluster.ingress.dispatch import ModelDispatch
from hycluster.ingress.forms import in_form
from hycluster.ingress.guarded import OPEN, PROBES, Guarded
from tests.auth.keyed import Keyed, keyed

pytestmark = pytest.mark.timeout(60)

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def stand_in(name: str) -> ASGIApp:
    """A model's app: a chat that says who asked; and each other path too."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        caller = current_caller.get()
        said: dict[str, Any] = {"app": name, "owner": caller and caller.owner, "path": scope["path"]}
        if scope["path"] == "/v1/models":
            said = {"object": "list", "data": [{"id": each} for each in ({"b": ["b", "c"]}.get(name, [name]))]}
        if scope["path"] == "/v1/chat/completions":
            message = {"role": "assistant", "content": f"{name} {caller and caller.owner}"}
            said = {"id": "c", "object": "chat.completion", "created": 0, "model": name,
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
        if scope["path"] == "/v1/messages":
            said = {"id": "m", "type": "message", "role": "assistant", "model": name, "stop_reason": "end_turn",
                    "content": [{"type": "text", "text": f"{name} {caller and caller.owner}"}],
                    "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}  # fmt: skip
        await JSONResponse(said)(scope, receive, send)

    return app


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path) as known:
        yield known


def dispatch(*models: str) -> ASGIApp:
    """Models a and b; b has the adapter c."""
    known = {"a": "a", "b": "b", "c": "b"}
    return ModelDispatch({name: stand_in(name) for name in models or ("a", "b")}, known.get, lambda: list(known))


@pytest.fixture
def app(keys: Keyed) -> ASGIApp:
    return in_form(Guarded(dispatch(), keys.guard), ["https://page.example"])


@pytest.fixture
def http(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress")


@pytest.fixture
def by_openai(app: ASGIApp) -> Callable[[str], openai.AsyncOpenAI]:
    def connect(key: str) -> openai.AsyncOpenAI:
        # The client brings its own httpx, under a name that depends on its version.
        theirs: Any = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])
        transport = theirs.AsyncClient(transport=theirs.ASGITransport(app))
        return openai.AsyncOpenAI(base_url="http://ingress/v1", api_key=key, max_retries=0, http_client=transport)

    return connect


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_probes_send_nothing_and_hear_of_no_model(http: httpx.AsyncClient) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"{"

    assert (await http.get("/health")).status_code == 200
    answer = await http.post("/health", content=body())
    assert answer.status_code == 401
    assert sent == 0
    for asked in (await http.get("/health?model=z"), await http.post("/health?model=z")):
        assert not any(f"'{name}'" in asked.text for name in "abc"), asked.text


async def test_openais_client(keys: Keyed, by_openai: Callable[[str], openai.AsyncOpenAI]) -> None:
    client = by_openai(keys.key())
    answer = await client.chat.completions.create(model="b", messages=MESSAGES)
    assert answer.choices[0].message.content == "b acme/search"
    assert [model.id async for model in client.models.list()] == ["a", "b", "c"]
    with pytest.raises(openai.AuthenticationError) as unknown:
        await by_openai(new_key()).chat.completions.create(model="b", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.status_code) == ("invalid_api_key", 401)
    with pytest.raises(openai.PermissionDeniedError) as denied:
        await client.batches.list()
    assert denied.value.code == "insufficient_permissions"
    assert "needs the scope 'batch'" in denied.value.message
    with pytest.raises(openai.NotFoundError) as other:
        await client.chat.completions.create(model="none", messages=MESSAGES)
    assert other.value.code == "model_not_found"


async def test_a_model_that_is_not_allowed_is_as_if_it_were_not_there(
    keys: Keyed, by_openai: Callable[[str], openai.AsyncOpenAI], http: httpx.AsyncClient
) -> None:
    key = keys.key(models=["c", "gone"])
    client = by_openai(key)
    assert [model.id async for model in client.models.list()] == ["c"]
    assert (await client.chat.completions.create(model="c", messages=MESSAGES)).model == "b"
    for name in ("a", "b", "zz"):
        with pytest.raises(openai.NotFoundError) as error:
            await client.chat.completions.create(model=name, messages=MESSAGES)
        assert error.value.code == "model_not_found"
        assert f"model: {name!r} is not served here; served are 'c', 'gone'" in error.value.message
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve(name)
    with pytest.raises(openai.NotFoundError, match=r"'gone' is not served here.*served are 'c'"):
        await client.chat.completions.create(model="gone", messages=MESSAGES)
    # Nor by what names none, or two.
    for path, body in (
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions?model=c", {}),
        ("/v1/chat/completions?model=a", {"model": "c"}),
        ("/v1/chat/completions?model=c", {"model": "a"}),
        ("/v1/completions", {"model": ["a"]}),
    ):
        answer = await http.post(path, json=body, headers=bearing(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), (path, body)


async def test_one_model_alone(keys: Keyed) -> None:
    app = Guarded(dispatch("a"), keys.guard)
    key = keys.key(models=["c"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        for body in ({}, {"model": "a"}):
            answer = await http.post("/v1/chat/completions", json=body, headers=bearing(key))
            assert answer.status_code == 404
        listed = await http.get("/v1/models", headers=bearing(key))
        assert listed.json() == {"object": "list", "data": []}


async def test_anthropics_client(keys: Keyed, app: ASGIApp) -> None:
    theirs: Any = importlib.import_module(anthropic.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])

    def connect(key: str) -> anthropic.AsyncAnthropic:
        transport = theirs.AsyncClient(transport=theirs.ASGITransport(app))
        return anthropic.AsyncAnthropic(base_url="http://ingress", api_key=key, max_retries=0, http_client=transport)

    ask: Any = {"model": "a", "max_tokens": 5, "messages": MESSAGES}
    said: Any = (await connect(keys.key()).messages.create(**ask)).content[0]
    assert said.text == "a acme/search"
    with pytest.raises(anthropic.AuthenticationError) as error:
        await connect(new_key()).messages.create(**ask)
    assert error.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        await connect(keys.key(models=["b"])).messages.create(**ask)


async def test_anthropics_header_opens_its_route_alone(keys: Keyed, http: httpx.AsyncClient) -> None:
    key = {"x-api-key": keys.key()}
    assert (await http.post("/v1/messages", json={"model": "a"}, headers=key)).status_code == 200
    assert (await http.post("/v1/completions", json={"model": "a"}, headers=key)).status_code == 401


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", (200, 200, 200, 200)),
        ("/ping", (401, 200, 200, 200)),
        ("/v1/chat/completions", (401, 200, 200, 200)),
        ("/v1/responses/resp_1", (401, 200, 200, 200)),
        ("/v1/files", (401, 403, 200, 403)),
        ("/v1/batches/batch_1/cancel", (401, 403, 200, 403)),
        ("/metrics", (401, 403, 403, 200)),
        ("/metrics/", (401, 403, 403, 200)),
        ("/ui", (401, 403, 403, 200)),
        ("/ui/jobs", (401, 403, 403, 200)),
        ("/ui/usage", (401, 403, 403, 200)),
        ("/hycluster/status", (401, 403, 403, 200)),
        ("/hycluster/requests/r", (401, 403, 403, 200)),
        ("/sleep", (401, 403, 403, 200)),
        ("/v1/load_lora_adapter", (401, 403, 403, 200)),
        ("/v1/models/../../metrics", (401, 403, 403, 200)),
        ("//v1/models", (401, 403, 403, 200)),
        ("/health/", (401, 403, 403, 200)),
        ("/whatever", (401, 403, 403, 200)),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_who_may_what(
    keys: Keyed, http: httpx.AsyncClient, method: str, path: str, status: tuple[int, ...]
) -> None:
    answers = [await http.request(method, path)]
    answers += [
        await http.request(method, path, headers=bearing(keys.key(*scopes))) for scopes in ((), ("batch",), ("admin",))
    ]
    if path in OPEN and method not in PROBES:
        status = (401, 403, 403, 200)
    assert tuple(answer.status_code for answer in answers) == status
    for answer in answers:
        assert answer.headers["x-request-id"]
        if answer.status_code == 401:
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_ten_thousand_others_and_some_odd_ones(
    keys: Keyed, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = keys.key()
    headers: list[Any] = [bearing(new_key()) for _ in range(10_000)]
    headers += [bearing(key[:size]) for size in range(0, len(key), 5)]
    odd = ("", "Bearer", "Bearer ", f"Basic {key}", f"Token {key}", key, "Basic =", "Bearer " + "x" * 20_000)
    headers += [{"authorization": said} for said in odd]
    headers += [[(b"authorization", b"Bearer \xff\xfe")], {"x-api-key": key}, {"cookie": key}]

    async def status(headers: Any) -> int:
        # This loop leaves the thread that looks for changes little of the interpreter. If it has not looked for two
        # seconds, who is not known is told to come again.
        while (answer := await http.get("/v1/models", headers=headers)).status_code == 503:  # noqa: ASYNC110
            await asyncio.sleep(float(answer.headers["retry-after"]))
        return answer.status_code

    assert {await status(each) for each in headers} == {401}
    assert (await http.get("/v1/models", headers=bearing(key))).status_code == 200
    keys.revoke_all()
    # The same once more.
    assert (await http.get("/v1/models", headers=bearing(key))).status_code == 401
    assert key not in caplog.text
    assert digest(key).hex() not in caplog.text


async def test_an_expired_one(keys: Keyed, http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/models", headers=bearing(keys.key(lasts_s=-1)))
    assert (answer.status_code, answer.json()["error"]["message"]) == (401, "API key: has expired")


async def test_a_browsers_user_is_asked_for_the_page(keys: Keyed, http: httpx.AsyncClient) -> None:
    asked = await http.get("/ui")
    assert any(said.startswith("Basic realm=") for said in asked.headers.get_list("www-authenticate"))
    for headers, challenges in (({}, 1), ({"origin": "https://page.example"}, 1), ({"origin": "http://ingress"}, 2)):
        refused = await http.post("/v1/completions", headers=headers)
        assert len(refused.headers.get_list("www-authenticate")) == challenges
    given = {"authorization": "Basic " + base64.b64encode(f"me:{keys.key('admin')}".encode()).decode()}
    assert (await http.get("/ui", headers=given)).status_code == 200
    here, elsewhere = {"origin": "http://ingress"}, {"origin": "https://evil.example"}
    ask: Any = {"json": {"model": "a"}}
    assert (await http.post("/v1/completions", headers=given | here, **ask)).status_code == 200
    # A browser sends it for a form of another page, too.
    assert (await http.post("/v1/completions", headers=given | elsewhere, **ask)).status_code == 401
    assert (await http.post("/sleep", headers=given | {"origin": "null"})).status_code == 401


async def test_other_origins_are_told_why_they_are_refused(http: httpx.AsyncClient) -> None:
    origin = {"origin": "https://page.example"}
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert (await http.options("/v1/chat/completions", headers=preflight)).status_code == 200
    refused = await http.post("/v1/chat/completions", headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")


async def test_the_database_is_away(keys: Keyed, http: httpx.AsyncClient) -> None:
    known = keys.key()
    elsewhere = keys.file.with_suffix(".elsewhere")
    keys.file.rename(elsewhere)
    strange = bearing(new_key())

    async def answered(*, but: int) -> httpx.Response:
        """As soon as it is something else; without a pause they would hold up the look at the database."""
        while (answer := await http.get("/v1/models", headers=strange)).status_code == but:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return answer

    answer = await answered(but=401)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["x-hycluster-error"] == "Unavailable"
    assert (await http.get("/v1/models", headers=bearing(known))).status_code == 200
    elsewhere.rename(keys.file)
    assert (await answered(but=503)).status_code == 401
