"""A stand-in for an ingress around the page: it tells a made state, timelines and chats, and what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hycluster.directory.faults import ReplicaFault
from hycluster.page.app import with_page
from hycluster.state.cluster_state import ClusterState
from hycluster.state.usage_state import UsageState
from tests.state.made import NOW, made_state, made_usage

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}&amp;"


class StandInIngress:
    """What the page stands before.

    Attributes:
        asked: paths that went past the page, with the key that came along.
        says: the pieces of each answer to a chat; an error in their place ends it.
        pause_s: before each of them.
        refuses: a chat, with this message.
    """

    def __init__(self) -> None:
        self.state = made_state()
        self.usage: UsageState | None = made_usage()
        self.timelines: dict[str, Any] = {}
        self.slowest: list[Any] | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.says: list[str | dict[str, Any]] = ["The ", "quick ", "brown fox."]
        self.pause_s = 0.0
        self.refuses = ""
        self.chats: list[dict[str, Any]] = []

    async def watch(self) -> ClusterState:
        return self.state

    async def look_at_usage(self) -> UsageState:
        assert self.usage is not None
        return self.usage

    async def timeline(self, request: Request) -> JSONResponse:
        self._note(request)
        told = self.timelines.get(request.path_params["id"])
        return JSONResponse(told) if told else JSONResponse({"error": {}}, 404)

    async def slow(self, request: Request) -> JSONResponse:
        self._note(request)
        return JSONResponse({"requests": self.slowest}) if self.slowest is not None else JSONResponse({}, 404)

    async def chat(self, request: Request) -> Response:
        self.chats.append(await request.json())
        if self.refuses:
            return JSONResponse({"error": {"message": self.refuses}}, 429)
        return StreamingResponse(self._events(), media_type="text/event-stream", headers={"x-request-id": "chat/1"})

    async def _events(self) -> AsyncIterator[str]:
        for piece in self.says:
            await asyncio.sleep(self.pause_s)
            if isinstance(piece, dict):
                yield f"data: {json.dumps(piece)}\n\n"
                return
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': piece}}]})}\n\n"
        usage = {"completion_tokens": len(self.says)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    async def other(self, request: Request) -> PlainTextResponse:
        self._note(request)
        return PlainTextResponse("the models' app")

    def _note(self, request: Request) -> None:
        self.asked.append((request.url.path, request.headers.get("authorization")))

    @property
    def app(self) -> Any:
        others = Starlette(
            routes=[
                Route("/hycluster/requests", self.slow),
                Route("/hycluster/requests/{id:path}", self.timeline),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/{path:path}", self.other, methods=["GET", "POST"]),
            ]
        )
        return with_page(self.watch, others, self.look_at_usage)


def evil_state(state: ClusterState) -> ClusterState:
    pool = state.pools[0]
    return replace(
        state,
        problems=(EVIL,),
        pools=(
            replace(
                pool,
                model=EVIL,
                adapters=(EVIL,),
                replicas=tuple(replace(each, id=EVIL, host=EVIL) for each in pool.replicas),
                starting=tuple(replace(each, replica=EVIL) for each in pool.starting),
                jobs=tuple(replace(each, job=EVIL) for each in pool.jobs),
            ),
        ),
        batches=tuple(replace(each, id=EVIL, status=EVIL, why=EVIL, model=EVIL) for each in state.batches or ()),
        faults=(ReplicaFault(NOW, EVIL, EVIL, EVIL),),
        traffic_by_model={EVIL: state.traffic, "b": state.traffic},
    )


def evil_usage(usage: UsageState) -> UsageState:
    return replace(
        usage,
        currency="<i>",
        problems=(EVIL,),
        spans=tuple(
            replace(part, owners=tuple(replace(each, tenant=EVIL, project=EVIL) for each in part.owners))
            for part in usage.spans
        ),
        limits=tuple(replace(each, whose=EVIL, of=EVIL, model=EVIL) for each in usage.limits),
    )


EVIL_TIMELINE = {
    "id": EVIL,
    "model": EVIL,
    "status": EVIL,
    "started": EVIL,
    "duration_s": "1",
    "spans": [{"name": EVIL, "process": EVIL, "start_s": "x", "duration_s": None, "attributes": {EVIL: EVIL}}],
    "events": [{"name": EVIL, "attributes": {EVIL: [EVIL]}}, EVIL, None],
}
