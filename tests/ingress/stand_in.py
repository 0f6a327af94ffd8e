"""A stand-in for the pool behind the ingress processes: no model, deterministic words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Unpack

from hycluster.core import (
    Generation,
    GenerationRequest,
    ModelCard,
    Output,
    PromptFields,
    TokenLogprob,
    ToolCall,
    Usage,
)
from hycluster.errors import InvalidInput, UnknownModel
from hycluster.ingress.grpc import GrpcBackend, GrpcIngress, serve_grpc
from hycluster.settings.ingress import Grpc
from tests.waiting import until

MODEL = "stand-in"
CARD = ModelCard(name=MODEL, max_model_len=262_144, ready_replicas=2)


class StandInGenerator:
    """Says ``w0 w1 w2 ...``, a word a token, for each of the ``n`` sequences.

    Attributes:
        requests: what it was asked, with the deadline in seconds that came along.
        error: raised by every method, if set; by ``stream`` after ``error_after`` deltas.
        failures_left: how many times more ``error`` is raised, other than by ``ready``; None is always.
        pause_s: seconds before each word.
        running: number of requests now being answered.
        chats: what came with what it was to tokenize.
        says: in the place of words, the outputs of a request's deltas.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[GenerationRequest, float | None]] = []
        self.error: Exception | None = None
        self.error_after = 0
        self.failures_left: int | None = None
        self.pause_s = 0.0
        self.running = 0
        self.chats: list[PromptFields] = []
        self.says: list[Output] = []
        self.is_ready = True

    def model_of(self, name: str) -> str | None:
        return name if name == MODEL else None

    async def models(self) -> list[ModelCard]:
        self._fail()
        return [CARD]

    async def stream(
        self, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[Generation, None]:
        self.requests.append((request, deadline_s))
        if request.model != MODEL:
            raise UnknownModel(request.model, [MODEL])
        words, n = len(self.says) or request.sampling.max_tokens or 3, request.sampling.n
        self.running += 1
        try:
            for step in range(words):
                if step >= self.error_after:
                    self._fail()
                await asyncio.sleep(self.pause_s)
                last = step + 1 == words
                yield Generation(
                    request_id=request.request_id or "made-by-server",
                    model=MODEL,
                    outputs=[self._output(request, index, step, last) for index in range(n)],
                    usage=Usage(_prompt_tokens(request), words * n, cached_tokens=1) if last else None,
                )
        finally:
            self.running -= 1

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        async with aclosing(self.stream(request, deadline_s=deadline_s)) as deltas:
            return join([delta async for delta in deltas])

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        prompt, messages = asked.pop("prompt", None), asked.pop("messages", None)
        self.chats.append(asked)
        if prompt is None and messages is None:
            raise InvalidInput("prompt, messages: exactly one must be set; set are none")
        text = prompt if prompt is not None else " ".join(m["content"] for m in messages or [])
        return [len(word) for word in text.split()]

    async def count_tokens(self, model: str, texts: Sequence[str]) -> list[int]:
        self._fail()
        if model != MODEL:
            raise UnknownModel(model, [MODEL])
        return [len(text.split()) for text in texts]

    async def ready(self) -> bool:
        if self.error:
            raise self.error
        return self.is_ready

    def _output(self, request: GenerationRequest, index: int, step: int, last: bool) -> Output:
        if self.says:
            return replace(self.says[step], index=index)
        candidates = request.sampling.logprobs
        return Output(
            index=index,
            text=f"w{step} ",
            token_ids=[100 * index + step],
            finish_reason="length" if last else None,
            logprobs=None
            if candidates is None
            else [[TokenLogprob(100 * index + step + c, f"w{step + c}", -0.1 * (c + 1)) for c in range(candidates)]],
        )

    def _fail(self) -> None:
        if self.error and self.failures_left != 0:
            if self.failures_left is not None:
                self.failures_left -= 1
            raise self.error

    async def until_busy(self) -> None:
        """Wait until a request is being answered."""
        await until(lambda: self.running > 0)

    async def until_idle(self) -> None:
        """Wait until no request is being answered; shows a cancel where an answer takes longer than that waits."""
        await until(lambda: self.running == 0)


def join(deltas: list[Generation]) -> Generation:
    """The whole answer that the deltas make up."""
    outputs: dict[int, list[Output]] = {}
    for delta in deltas:
        for output in delta.outputs:
            outputs.setdefault(output.index, []).append(output)
    return Generation(
        request_id=deltas[-1].request_id,
        model=deltas[-1].model,
        outputs=[
            Output(
                index=index,
                text="".join(part.text for part in parts),
                token_ids=[token for part in parts for token in part.token_ids],
                finish_reason=parts[-1].finish_reason,
                logprobs=[position for part in parts for position in part.logprobs or []] or None,
                reasoning="".join(part.reasoning for part in parts),
                tool_calls=join_calls([call for part in parts for call in part.tool_calls]),
            )
            for index, parts in sorted(outputs.items())
        ],
        usage=deltas[-1].usage,
    )


def join_calls(pieces: list[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls that the pieces make up."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        begun = calls.get(piece.index, ToolCall(piece.index, "", "", ""))
        calls[piece.index] = ToolCall(
            piece.index, begun.id or piece.id, begun.name or piece.name, begun.arguments + piece.arguments
        )
    return tuple(calls.values())


@asynccontextmanager
async def open_ingress(generator: GrpcBackend, **settings: Any) -> AsyncIterator[GrpcIngress]:
    """A gRPC ingress on a free port, that looks at the generator's readiness every 20 ms."""
    ingress = await serve_grpc(generator, Grpc(port=0, **settings), ready_poll_s=0.02)
    try:
        yield ingress
    finally:
        await ingress.stop(0)


def _prompt_tokens(request: GenerationRequest) -> int:
    if request.token_ids is not None:
        return len(request.token_ids)
    texts = [request.prompt] if request.prompt is not None else [str(m["content"]) for m in request.messages or []]
    return sum(len(text.split()) for text in texts)
