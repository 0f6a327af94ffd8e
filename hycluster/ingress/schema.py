"""``/openapi.json`` with the routes that are beside vLLM's."""

from __future__ import annotations

import json

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.ingress.dispatch import answer_of

PATH = "/openapi.json"


class WithSchema:
    """ASGI middleware: puts the routes of ``beside`` into the schema that ``app`` answers, over those that it has."""

    def __init__(self, app: ASGIApp, beside: FastAPI) -> None:
        self._app = app
        self._beside = beside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        status, body = await answer_of(self._app, scope, receive)
        if status != 200:
            await Response(body, status, media_type="application/json")(scope, receive, send)
            return
        schema = json.loads(body)
        ours = get_openapi(title=self._beside.title, version=self._beside.version, routes=self._beside.routes)
        schema["paths"] |= ours["paths"]
        known = schema.setdefault("components", {}).setdefault("schemas", {})
        known |= ours.get("components", {}).get("schemas", {})
        await JSONResponse(schema)(scope, receive, send)
