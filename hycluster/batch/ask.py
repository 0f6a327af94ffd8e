"""A job's calls to the engines, made again while none of them can serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from hycluster.core import Generation, GenerationRequest, ModelCard
from hycluster.errors import HyclusterError, InvalidInput, JobFailed, Overloaded, Unauthenticated, UnknownModel

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 15.0

T = TypeVar("T")


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


class Asker:
    """Asks for all rows of one process.

    Args:
        retry_s: seconds for which a call is tried again while no engine can serve it.
    """

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s

    async def __call__(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call until there is an answer or ``retry_s`` have passed without one.

        Args:
            name: of the row, for errors.
            call: one attempt.

        Raises:
            InvalidInput, UnknownModel, Unauthenticated: asking again is of no use.
            JobFailed: no engine could serve it in all that time.
        """
        give_up_s = time.monotonic() + self._retry_s
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                return await call()
            except (InvalidInput, UnknownModel, Unauthenticated):
                raise
            except (HyclusterError, ConnectionError, TimeoutError) as error:
                # Being told to wait is no failure: online traffic goes first, for as long as it takes.
                if time.monotonic() >= give_up_s and not isinstance(error, Overloaded):
                    raise JobFailed(f"row {name}: no engine could serve it for {self._retry_s:g} s: {error}") from None
                await asyncio.sleep(getattr(error, "retry_after_s", None) or backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)


def first_error(errors: BaseException) -> BaseException:
    """The first real error of a group, however deep."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
