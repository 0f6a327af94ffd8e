"""In the place of vLLM's app: answers ``/v1/responses`` in its form, with what it was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hycluster.ingress.metrics import MODEL_KEY
from hycluster.responses.events import as_sse


class StandInApp:
    """Says of which texts the conversation is made.

    Attributes:
        bodies: what it was asked.
        refusals: statuses of its next answers.
        hold: streams stop behind their second event until it is set.
        running: streams that have begun and not ended.
        ending: how streams end: with this status, or not at all if it is None.
        calls: what the model calls instead of saying something.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.refusals: list[int] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.running = 0
        self.ending: str | None = "completed"
        self.calls: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[
                Route("/v1/responses", self._create, methods=["POST"]),
                Route("/v1/models", lambda _: JSONResponse({"data": []})),
            ]
        )

    async def _create(self, request: Request) -> Response:
        try:
            body = dict(await request.json())
        except ValueError:
            return JSONResponse({"error": {"message": "not a request", "code": 400}}, 400)
        self.bodies.append(body)
        # As what finds a request's model does.
        request.scope.get(MODEL_KEY, []).append("m")
        if self.refusals:
            status = self.refusals.pop(0)
            return JSONResponse({"error": {"message": f"refused with {status}", "code": status}}, status)
        if not isinstance(body.get("input"), str | list):
            return JSONResponse({"error": {"message": "input: must be set", "code": 400}}, 400)
        if body.get("stream"):
            return StreamingResponse(self._stream(request, body), media_type="text/event-stream")
        return JSONResponse(self._response(body, "completed"))

    async def _stream(self, request: Request, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            begun = self._response(body, "in_progress") | {"output": []}
            yield as_sse({"type": "response.created", "sequence_number": 0, "response": begun})
            yield as_sse({"type": "response.output_text.delta", "sequence_number": 1, "delta": "so"})
            await self.hold.wait()
            if self.ending is not None:
                ended = self._response(body, self.ending)
                # In two pieces, as sockets have them.
                event = as_sse({"type": f"response.{self.ending}", "sequence_number": 2, "response": ended})
                yield event[:30]
                yield event[30:]
        finally:
            self.running -= 1

    def _response(self, body: dict[str, Any], status: str) -> dict[str, Any]:
        texts = "|".join(map(_text, body["input"])) if isinstance(body["input"], list) else body["input"]
        said = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        content = [{"type": "output_text", "text": f"<{texts}>", "annotations": []}]
        return {
            "id": body.get("request_id", "resp_of_vllm"),
            "object": "response",
            "created_at": 1,
            "model": body["model"],
            "status": status,
            "output": self.calls or [said | {"content": content}],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "background": body.get("background", False),
            "previous_response_id": body.get("previous_response_id"),
        }


def _text(item: dict[str, Any]) -> str:
    content = item.get("content", json.dumps(item.get("arguments", item.get("output", ""))))
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
