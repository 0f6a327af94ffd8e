"""Asking a request at an ingress process, and what came back when."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from hycluster.chaos.requests import Request
from hycluster.chaos.sse import event_lines
from hycluster.client import AsyncClient, https_context, key_header
from hycluster.errors import HyclusterError, Overloaded, Unavailable
from hycluster.ingress.status import ERROR_KEY

CONNECT_TIMEOUT_S = 5.0


class ConnectionLost(Unavailable):
    """An ingress process went away, or there was none: what is asked again then is lost to nobody."""


class NotDone(HyclusterError):
    """A stream ended as if it were whole, without saying so."""


@dataclass(frozen=True, slots=True)
class Said:
    """One of the ``n`` answers. ``logprobs`` has the sampled tokens', natural."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    said: tuple[Said, ...]
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Trace:
    """When the tokens of a request came, on ``time.monotonic``'s clock, over all its attempts.

    Attributes:
        times_s: by number of the answer.
    """

    begun_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    times_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def longest_gap_s(self, after_s: float = 0.0) -> float:
        """Between two tokens of an answer, or between the start and its first one, that ended later than ``after_s``.

        A request that never got a token has waited to its end.
        """
        answers = list(self.times_s.values()) or [[self.ended_s]]
        return max(
            (
                later - earlier
                for times in answers
                for earlier, later in zip([self.begun_s, *times], times, strict=False)
                if later > after_s
            ),
            default=0.0,
        )


@dataclass(slots=True)
class _Growing:
    """One of the ``n`` answers, as it comes."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)


class Reading:
    """An answer on its way.

    Attributes:
        begun: a token has come.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._answers: dict[int, _Growing] = defaultdict(_Growing)
        self.usage: tuple[int, int] | None = None

    @property
    def begun(self) -> bool:
        return bool(self._answers)

    def add(
        self, index: int, text: str, token_ids: list[int], finish_reason: str | None, logprobs: list[float]
    ) -> None:
        """A chunk of it."""
        answer = self._answers[index]
        if token_ids:
            self._trace.times_s[index].append(time.monotonic())
        answer.text.append(text)
        answer.token_ids += token_ids
        answer.finish_reason = finish_reason or answer.finish_reason
        answer.logprobs += logprobs

    def whole(self, request: Request) -> Reply:
        """The answer, now that the stream has ended.

        Raises:
            NotDone: it does not say that it is whole.
        """
        if self.usage is None:
            raise NotDone("the stream ended without its last chunk")
        said = (self._answers[index] for index in range(request.sampling.n))
        return Reply(
            tuple(
                Said(
                    "".join(a.text),
                    tuple(a.token_ids),
                    a.finish_reason,
                    tuple(a.logprobs) if request.sampling.logprobs is not None else None,
                )
                for a in said
            ),
            *self.usage,
        )


async def by_grpc(target: str, model: str, request: Request, reading: Reading) -> None:
    """Ask at the gRPC ingress.

    Raises:
        ConnectionLost: see there.
        HyclusterError: what the ingress process said.
    """
    ask: dict[str, Any] = (
        {"messages": [{"role": "user", "content": request.prompt}]} if request.chat else {"prompt": request.prompt}
    )
    try:
        # A connection of its own: ingress processes that share a port get their shares of them.
        async with (
            AsyncClient(target) as client,
            aclosing(client.stream(model, sampling=request.sampling, **ask)) as deltas,
        ):
            async for delta in deltas:
                for part in delta.outputs:
                    logprobs = [candidates[0].logprob for candidates in part.logprobs or []]
                    reading.add(part.index, part.text, part.token_ids, part.finish_reason, logprobs)
                if delta.usage is not None:
                    reading.usage = delta.usage.prompt_tokens, delta.usage.completion_tokens
    except Unavailable as error:
        if _said_by_ingress(error.__cause__):
            raise
        raise ConnectionLost(error.message) from None


def _said_by_ingress(failure: BaseException | None) -> bool:
    """Else gRPC said so itself, whose connection broke."""
    return isinstance(failure, grpc.aio.AioRpcError) and ERROR_KEY in dict(failure.trailing_metadata() or ())


def http_client() -> httpx.AsyncClient:
    """A client that waits for as long as it is let."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    return httpx.AsyncClient(timeout=timeout, limits=limits, headers=key_header(), verify=https_context())


async def by_http(client: httpx.AsyncClient, url: str, model: str, request: Request, reading: Reading) -> None:
    """Ask at the HTTP ingress.

    Raises:
        ConnectionLost, NotDone: see there.
        HyclusterError: what the ingress process said; ``Overloaded`` or ``Unavailable`` for 429 and 503.
    """
    path = "chat/completions" if request.chat else "completions"
    try:
        async with client.stream("POST", f"{url}/v1/{path}", json=_body(model, request)) as answer:
            if answer.status_code != httpx.codes.OK:
                raise _refusal(answer.status_code, (await answer.aread()).decode(errors="replace"), answer.headers)
            async for event in _events(answer):
                _read(event, reading)
    except httpx.TransportError as error:
        raise ConnectionLost(f"{type(error).__name__}: {error}") from None


def _body(model: str, request: Request) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "n": sampling.n,
        "ignore_eos": sampling.ignore_eos,
    }
    if request.chat:
        body["messages"] = [{"role": "user", "content": request.prompt}]
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    else:
        body["prompt"] = request.prompt
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
    return body


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of an answer, up to its ``[DONE]``."""
    async for line in event_lines(answer):
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        yield json.loads(data)
    raise NotDone("the stream ended without [DONE]")


def _read(event: dict[str, Any], reading: Reading) -> None:
    if error := event.get("error"):
        raise _refusal(int(error.get("code") or 500), str(error.get("message")), {})
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        logprobs = choice.get("logprobs") or {}
        found = (
            [entry["logprob"] for entry in logprobs["content"]]
            if logprobs.get("content")
            else list(logprobs.get("token_logprobs") or [])
        )
        token_ids = list(choice.get("token_ids") or [])
        if text or token_ids or choice.get("finish_reason"):
            reading.add(choice["index"], text or "", token_ids, choice.get("finish_reason"), found)
    if usage := event.get("usage"):
        reading.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _refusal(status: int, text: str, headers: Any) -> HyclusterError:
    # What stands before an ingress process answers in its own form.
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    kind = {429: Overloaded, 503: Unavailable}.get(status, HyclusterError)
    wait = headers.get("retry-after")
    return kind(f"{status}: {' '.join(text.split())[:300]}", retry_after_s=float(wait) if wait else None)
