"""The HTTP ingress's side of limits: a request that asks a model is let in by its caller's, and hears how it stands."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.auth.caller import current_caller
from hycluster.errors import HyclusterError, Overloaded, Unavailable
from hycluster.gateway.generation import Generator
from hycluster.gateway.limited import BYTES_PER_TOKEN, expected_output_tokens
from hycluster.ingress.dispatch import named_by, read_on
from hycluster.ingress.errors import answer_error
from hycluster.limits.reservation import RequestTokens, reserving

GENERATE = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
ASK = GENERATE | {"/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling", "/classify"}
# Where prompts are.
PROMPTS = (
    "messages", "prompt", "input", "instructions", "system", "tools", "query", "documents", "queries", "items", "data",
    "data_1", "data_2", "text_1", "text_2", "prompt_embeds",
)  # fmt: skip
# Those of them that are several prompts, each with an answer of its own, if they are lists.
SEVERAL = ("prompt", "prompt_embeds")
# More are never let in, and a number that is longer can't even be told.
MOST_ANSWERS = 1 << 20
# What callers name the most tokens of an answer by: that which the route reads, not one that another route would.
MOST = {"/v1/chat/completions": ("max_completion_tokens", "max_tokens"), "/v1/responses": ("max_output_tokens",)}
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
        asked = _read(body)
        name, model = await self._asked(scope, receive, asked)
        met = limiter.concerning(caller, name) if model is not None else []
        if model is None or not met:
            await self._app(scope, receive, send)
            return
        gateway, status = self._generator.gateways[model], 0

        def with_headers(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told = ((name.encode(), value.encode()) for name, value in limiter.headers(met).items())
                message["headers"] = [*message.get("headers", ()), *told]
            return send(message)

        expected, prompts = _expected(gateway, scope["path"], asked)
        try:
            reservation = await limiter.reserve(met, expected, gateway.model.price, prompts)
        except HyclusterError as error:
            await (await answer_error(None, error))(scope, receive, with_headers)
            return
        try:
            with reserving(reservation):
                await self._app(scope, receive, with_headers)
        finally:
            reservation.end(counts=status not in TURNED_AWAY)

    async def _asked(self, scope: Scope, receive: Receive, asked: dict[str, Any] | None) -> tuple[str, str | None]:
        """What a request names, and the model that answers it, as :class:`ModelDispatch` has it."""
        models = self._generator
        if isinstance(name := (asked or {}).get("model"), str) and name:
            return name, models.model_of(name)
        elsewhere, _ = await named_by(scope, receive, in_body=False)
        model = models.model_of(elsewhere) or next(iter(models.gateways))
        # An adapter is asked by bodies alone.
        return model, model


def _read(body: bytes) -> dict[str, Any] | None:
    """What a request says; None if that can't be read, which whichever app is asked refuses."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _expected(gateway: Any, path: str, asked: dict[str, Any] | None) -> tuple[RequestTokens, int]:
    """What all prompts of a request may use, and how many there are."""
    if asked is None:
        return RequestTokens(1), 1
    prompts = max(1, sum(map(_several, filter(None, map(asked.get, SEVERAL))))) if path == "/v1/completions" else 1
    said = [json.dumps(asked[part], ensure_ascii=False) for part in PROMPTS if asked.get(part)]
    prompt = sum(len(each.encode("utf-8", "replace")) for each in said) // BYTES_PER_TOKEN + 1
    if isinstance(ids := asked.get("prompt"), list) and ids and all(isinstance(each, int) for each in ids):
        prompt = len(ids)
    if path not in GENERATE:
        return RequestTokens(prompt), 1
    prompt = min(prompt, gateway.model_config.max_model_len * prompts)
    most = max(_count(asked.get(name)) for name in MOST.get(path, ("max_tokens",)))
    n = prompts * max(1, min(_count(asked.get("n")), MOST_ANSWERS))
    return RequestTokens(prompt, 0, expected_output_tokens(gateway, most or None, n)), prompts


def _several(prompt: Any) -> int:
    """How many prompts it is: lists of numbers are one each."""
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _count(said: Any) -> int:
    """A number as vLLM reads it, which takes 5.0 and "5" for 5; 0 if it is none."""
    try:
        return max(0, said if isinstance(said, int) else int(float(said)))
    except (TypeError, ValueError, OverflowError):
        return 0
