"""A stand-in for the engines: answers from the prompt alone, fails where a test asks it to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Unpack

from hycluster.batch.task import Connect
from hycluster.core import Generation, GenerationRequest, ModelCard, Output, Priority, PromptFields, Usage
from hycluster.errors import InvalidInput, KillsReplicas, PromptTooLong, Unavailable
from hycluster.gateway.bulk import FIXED_ROWS, BulkLane, BulkLanes


class StandInGenerator:
    """Answers in capitals, one token a word, at most ``max_tokens`` words.

    Behaviour by what the prompt holds: ``refuse`` is invalid input; ``overlong`` has no room in the context;
    ``poison`` kills replicas; ``die FILE`` fails while FILE exists; ``kill FILE`` takes its process along, once; the
    rest is answered after a moment, out of order.
    """

    def __init__(self, log: Path | None = None, context_tokens: int = 1000) -> None:
        self.context_tokens = context_tokens
        self.in_flight = 0
        self.most_in_flight = 0
        self.log = log
        self.lanes = BulkLanes()

    def lane(self, model: str, job: str, most: int | None = None, fixed: int = FIXED_ROWS) -> BulkLane:
        return self.lanes.lane(job, most, fixed)

    async def models(self) -> list[ModelCard]:
        return [ModelCard("stand-in", self.context_tokens, 1)]

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        text = asked.get("prompt") or " ".join(str(message["content"]) for message in asked.get("messages") or [])
        return list(range(len(text.split()) + 1))

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        return lambda texts: [len(text.split()) for text in texts]

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        assert request.priority is Priority.BATCH
        assert request.request_id is not None
        assert request.messages is not None
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request.request_id, request)
        finally:
            self.in_flight -= 1
            if self.log:
                self.log.write_text(str(self.most_in_flight))

    async def _answer(self, request_id: str, request: GenerationRequest) -> Generation:
        assert request.messages is not None
        text = str(request.messages[-1]["content"])
        await asyncio.sleep(0.001 * (hash(request_id) % 5))
        if "refuse" in text:
            raise InvalidInput("prompt: refused by the stand-in")
        if "overlong" in text:
            raise PromptTooLong("prompt: has no room in the stand-in")
        if "poison" in text:
            raise KillsReplicas("3 stand-ins in a row died of this")
        _, die, file = text.partition("die ")
        if die and os.path.exists(file):  # noqa: ASYNC240
            raise Unavailable("the stand-in is down")
        _, kill, file = text.partition("kill ")
        if kill and os.path.exists(file):  # noqa: ASYNC240
            os.unlink(file)
            os.kill(os.getpid(), signal.SIGKILL)
        words = text.upper().split()
        kept = words[: request.sampling.max_tokens]
        output = Output(0, " ".join(kept), list(range(len(kept))), "stop" if kept == words else "length")
        return Generation(request_id, request.model, [output], Usage(len(words) + 1, len(kept)))


@asynccontextmanager
async def open_stand_in(log: Path | None) -> AsyncIterator[StandInGenerator]:
    yield StandInGenerator(log)


def stand_in(log: Path | None = None) -> Connect:
    """What ``Generate`` opens in its process; ``log`` will hold the most requests at once."""
    return partial(open_stand_in, log)
