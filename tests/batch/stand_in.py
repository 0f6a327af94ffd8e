"""A stand-in for the engines: answers from the prompt alone, fails where a test asks it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from hycluster.core import Generation, GenerationRequest, Output, Priority, Usage
from hycluster.errors import InvalidInput, Unavailable


class StandInGenerator:
    """Answers in capitals, one token a word.

    Behaviour by what the prompt holds: ``refuse`` is invalid input; ``die FILE`` fails for good while
    FILE exists; ``flaky`` fails once; the rest is answered after a moment, later rows sooner.
    """

    def __init__(self, log: Path | None = None) -> None:
        self.in_flight = 0
        self.most_in_flight = 0
        self.failed: set[str] = set()
        self.log = log

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
        if "die " in text and Path(text.split("die ")[1].split()[0]).exists():
            raise Unavailable("the stand-in is down")
        if "flaky" in text and request_id not in self.failed:
            self.failed.add(request_id)
            raise Unavailable("the stand-in hiccups")
        words = text.upper().split()
        output = Output(0, " ".join(words), list(range(len(words))), "stop")
        return Generation(request_id, request.model, [output], Usage(len(words) + 1, len(words)))


@asynccontextmanager
async def open_stand_in(log: Path | None) -> AsyncIterator[StandInGenerator]:
    yield StandInGenerator(log)


def stand_in(log: Path | None = None) -> Callable[[], object]:
    """What ``Generate`` opens in its process; ``log`` will hold the most requests at once."""
    return partial(open_stand_in, log)
