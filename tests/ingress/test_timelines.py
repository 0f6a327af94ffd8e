"""How requests over HTTP end, as their timelines have it; a stand-in for the app answers."""

from __future__ import annotations

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from hycluster.ingress.timelines import WithTimelines
from hycluster.observe import timelines
from hycluster.observe.timelines import Recorder
from hycluster.timeline import Timeline


@pytest.mark.parametrize(
    ("answered", "status", "error"),
    [(200, "ok", ""), (400, "failed", "HTTP 400"), (404, "failed", "HTTP 404"), (503, "failed", "HTTP 503")],
)
async def test_who_is_refused_has_no_answer(
    answered: int, status: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(timelines, "recorder", recorder)
    ended: list[Timeline] = []
    recorder.ended.append(ended.append)
    app = WithTimelines(PlainTextResponse("said", status_code=answered))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as client:
        answer = await client.post("/v1/chat/completions", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (answered, "mine")
    (timeline,) = ended
    assert (timeline.id, timeline.status, timeline.error) == ("mine", status, error)
    assert timeline.attributes["http.response.status_code"] == answered


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("résumé-1".encode(), "r%C3%A9sum%C3%A9-1"),
        ("résumé-1".encode("latin-1"), "r%E9sum%E9-1"),
        # What a terminal would obey, as bytes and as letters.
        (b"a\x9b2Jb\tc", "a%9B2Jb%09c"),
        ("a\u202eb".encode(), "a%E2%80%AEb"),
        (b"plain_~id:/#1 %41", "plain_~id:/#1 %41"),
    ],
)
async def test_an_id_is_the_same_in_all_views(said: bytes, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(timelines, "recorder", recorder)
    ended: list[Timeline] = []
    recorder.ended.append(ended.append)
    heard: list[list[str]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(Headers(scope=scope).getlist("x-request-id"))
        # In its midst it is found by what its caller wrote, too.
        for asked in {written, said.decode("utf-8", "replace")} if b"\xc3" in said else {written}:
            assert (found := recorder.find(asked)) is not None
            assert found["id"] == written
        await PlainTextResponse("said")(scope, receive, send)

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(WithTimelines(app)), base_url="http://ingress"
    ) as client:
        answer = await client.post("/v1/chat/completions", headers=[(b"x-request-id", said)])
    assert heard == [[written]]
    assert answer.headers["x-request-id"] == ended[0].id == written
