"""How requests over HTTP end, as their timelines have it; a stand-in for the app answers."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import PlainTextResponse

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
