"""One request of a job to the engines, asked again while none of them can serve it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hycluster.core import Generation, GenerationRequest, ModelCard
from hycluster.errors import HyclusterError, InvalidInput, JobFailed, Overloaded, Unauthenticated, UnknownModel

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 15.0


class Generator(Protocol):
    """What answers requests: a gateway over an engine pool."""

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation: ...

    async def models(self) -> list[ModelCard]:
        """What is served, with each model's longest context."""

    async def tokenize(
        self, model: str, *, prompt: str | None = None, messages: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a prompt, or of messages under the model's chat template."""

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        """Counts the tokens of many texts, special ones aside; may be called from any thread."""


async def ask(generator: Generator, request: GenerationRequest, retry_s: float) -> Generation:
    """Ask until there is an answer or ``retry_s`` have passed without one.

    Raises:
        InvalidInput, UnknownModel, Unauthenticated: asking again is of no use.
        JobFailed: no engine could serve it in all that time.
    """
    give_up_s = time.monotonic() + retry_s
    backoff_s = FIRST_BACKOFF_S
    while True:
        try:
            return await generator.generate(request)
        except (InvalidInput, UnknownModel, Unauthenticated):
            raise
        except (HyclusterError, ConnectionError, TimeoutError) as error:
            # Being told to wait is no failure: online traffic goes first, for as long as it takes.
            if time.monotonic() >= give_up_s and not isinstance(error, Overloaded):
                raise JobFailed(
                    f"row {request.request_id}: no engine could serve it for {retry_s:g} s: {error}"
                ) from None
            await asyncio.sleep(getattr(error, "retry_after_s", None) or backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)


def first_error(errors: BaseException) -> BaseException:
    """The first real error of a group, however deep."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
