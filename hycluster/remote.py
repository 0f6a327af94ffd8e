"""A running cluster, by its gRPC ingress, as what the tree of summaries asks its questions of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Protocol, TypeVar, Unpack, cast

from hycluster.batch.ask import first_error
from hycluster.client import Ask, AsyncClient
from hycluster.core import Generation, GenerationRequest, ModelCard, PromptFields
from hycluster.timeline import current

# Characters that are sent to be counted in one call: at most 1 MiB of UTF-8, which every ingress process takes.
COUNTED_CHARACTERS = 250_000
# Each is a member of the request, of which ``admission.max_members`` has a bound.
COUNTED_TEXTS = 8192
# Such calls on their way at a time: one is counted while another travels.
COUNTS_AT_ONCE = 2


T = TypeVar("T")


class CallMaker(Protocol):
    """Makes a call that has a name; an :class:`hycluster.batch.ask.Asker` makes it again where it fails."""

    async def __call__(self, name: str, call: Callable[[], Awaitable[T]]) -> T: ...


class Remote:
    """The ``RowBackend`` of ``hycluster/batch/ask.py`` over a connection. Make it in the event loop that uses it.

    Args:
        ask: makes the calls that count tokens; who generates brings retries along.
    """

    def __init__(self, client: AsyncClient, ask: CallMaker) -> None:
        self._client = client
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._counting = asyncio.Semaphore(COUNTS_AT_ONCE)

    async def models(self) -> list[ModelCard]:
        return await self._ask("models", self._client.list_models)

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        return await self._ask("tokens", partial(self._client.tokenize, model, **asked))

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        """Counts many texts in few calls; for threads other than the event loop's.

        A text longer than a call takes is counted slice by slice, which may find a token more or less a slice.
        """

        def count(texts: Sequence[str]) -> list[int]:
            return asyncio.run_coroutine_threadsafe(self._counts(model, texts), self._loop).result()

        return count

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        # Every field, also those that come to be: a row must ask the same whichever way it goes.
        asked = {of.name: getattr(request, of.name) for of in fields(request) if of.name != "model"}
        answer = await self._client.generate(request.model, **cast(Ask, asked | {"timeout_s": deadline_s}))
        if (timeline := current.get()) is not None:
            timeline.model = request.model
            if (usage := answer.usage) is not None:
                timeline.attributes["gen_ai.usage.input_tokens"] = usage.prompt_tokens
                timeline.attributes["gen_ai.usage.output_tokens"] = usage.completion_tokens
        return answer

    async def _counts(self, model: str, texts: Sequence[str]) -> list[int]:
        counts = [0] * len(texts)

        async def call(slices: list[tuple[int, str]]) -> None:
            async with self._counting:
                asked = partial(self._client.count_tokens, model, [text for _, text in slices])
                answer = await self._ask("tokens", asked)
            for (place, _), tokens in zip(slices, answer, strict=True):
                counts[place] += tokens

        try:
            async with asyncio.TaskGroup() as group:
                for slices in _calls(texts):
                    group.create_task(call(slices))
        except* Exception as errors:
            raise first_error(errors) from None
        return counts


def _calls(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Texts with their places, or slices of them, as many as one call takes."""
    held: list[tuple[int, str]] = []
    room = COUNTED_CHARACTERS
    for place, text in enumerate(texts):
        for start in range(0, len(text), COUNTED_CHARACTERS):
            piece = text[start : start + COUNTED_CHARACTERS]
            if held and (len(piece) > room or len(held) == COUNTED_TEXTS):
                yield held
                held, room = [], COUNTED_CHARACTERS
            held.append((place, piece))
            room -= len(piece)
    if held:
        yield held
