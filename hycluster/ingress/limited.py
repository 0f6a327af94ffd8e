"""The HTTP ingress's side of limits: a request that asks a model is let in by its caller's, and hears how it stands."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.auth.caller import current_caller
from hycluster.errors import HyclusterError, Overloaded, Unavailable
from hycluster.gateway.generation import Generator
from hycluster.gateway.limited import BYTES_PER_TOKEN, expected_output_tokens
from hycluster.ingress.dispatch import name_in, read_on
from hycluster.ingress.errors import answer_error
from hycluster.limits.reservation import RequestTokens, reserving

GENERATE = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
ASK = GENERATE | {"/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling", "/classify"}
# Where prompts are.
PROMPTS = ("messages", "prompt", "input", "instructions", "system", "tools", "query", "documents")
# What callers name the most tokens of an answer by.
MOST = ("max_completion_tokens", "max_output_tokens", "max_tokens")
# What turns a request away that has done nothing.
TURNED_AWAY = frozenset({Overloaded.http_status, Unavailable.http_status})


class Limited:
    """ASGI middleware around the app of all models."""

    def __init__(self, app: ASGIApp, generator: Generator) -> None:
        self._app = app
        self._generator = generator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limiter, caller = self._generator.limiter, current_caller.get()
        asks = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ASK
        if limiter is None or not asks or not limiter.may_limit(caller):
            await self._app(scope, receive, send)
            return
        body, receive = await read_on(receive)
        name = name_in(body) or next(iter(self._generator.gateways))
        model = self._generator.model_of(name)
        met = limiter.concerning(caller, name) if model is not None else []
        if model is None or not met:
            await self._app(scope, receive, send)
            return
        gateway, status = self._generator.gateways[model], 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                MutableHeaders(scope=message).update(limiter.headers(met))
            await send(message)

        try:
            reservation = await limiter.reserve(met, _expected(gateway, scope["path"], body), gateway.model.price)
        except HyclusterError as error:
            await (await answer_error(None, error))(scope, receive, told)
            return
        try:
            with reserving(reservation):
                await self._app(scope, receive, told)
        finally:
            reservation.end(counts=reservation.began or status not in TURNED_AWAY)


def _expected(gateway: Any, path: str, body: bytes) -> RequestTokens:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        # The app refuses it.
        return RequestTokens(1)
    if not isinstance(asked, dict):
        return RequestTokens(1)
    said = [json.dumps(asked[part], ensure_ascii=False) for part in PROMPTS if asked.get(part)]
    prompt = sum(len(each.encode("utf-8", "replace")) for each in said) // BYTES_PER_TOKEN + 1
    if isinstance(ids := asked.get("prompt"), list) and ids and all(isinstance(each, int) for each in ids):
        prompt = len(ids)
    n = asked.get("n") or 1
    prompts = len(asked["prompt"]) if isinstance(asked.get("prompt"), list) else 1
    prompt = min(prompt, gateway.model_config.max_model_len * max(1, prompts))
    if path not in GENERATE:
        return RequestTokens(prompt)
    most = next((asked[name] for name in MOST if isinstance(asked.get(name), int) and asked[name] > 0), None)
    n = n if isinstance(n, int) and 0 < n <= 10_000 else 1
    return RequestTokens(prompt, 0, expected_output_tokens(gateway, most, n))
