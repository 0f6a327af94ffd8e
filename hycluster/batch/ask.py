"""A job's calls to the engines, made again while none of them can serve."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, Unpack

from hycluster.batch.refusal import Reason, RowRefused
from hycluster.core import Generation, GenerationRequest, ModelCard, PromptFields
from hycluster.errors import (
    HyclusterError,
    InvalidInput,
    JobFailed,
    KillsReplicas,
    Overloaded,
    PermissionDenied,
    QuotaExhausted,
    RequestFailed,
    Unauthenticated,
    UnknownModel,
    kind_name,
)
from hycluster.retries import AsyncRetryingCaller, as_told
from hycluster.timeline import current

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 15.0
# Times that engines may end one request with an error, while they answer others, before it is refused.
MOST_FAILURES = 3
# What says that an engine is away or has failed; anything else may be what this one request makes of our own code.
AWAY = (HyclusterError, ConnectionError, TimeoutError)
FINAL = (InvalidInput, UnknownModel, Unauthenticated, PermissionDenied, QuotaExhausted, JobFailed)

T = TypeVar("T")


class RowBackend(Protocol):
    """What answers requests: a gateway over an engine pool."""

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation: ...

    async def models(self) -> list[ModelCard]:
        """What is served, with each model's longest context."""

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        """Token ids of a prompt, or of messages under the model's chat template."""

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        """Counts the tokens of many texts, special ones aside; may be called from any thread."""


@dataclass(slots=True)
class _Row:
    """How often engines have ended its request with an error, and what all rows had for answers before that."""

    name: str
    failures: int = 0
    answers_before: int = 0


class Asker:
    """Asks for all rows of one process.

    A row whose replica died is migrated by the pool, which also finds the one that replicas die of; here come the
    failures that are left, such as that there is no replica for a long time.

    Args:
        retry_s: seconds for which calls are tried again while no engine answers any of them.
        alive_s: tells when, on the monotonic clock, engines last were seen to compute for these calls, or to have no
            time for them. A row may lie there for hours while online requests go first, and that is no failure.
        probe: asks what any row asks, but for what is the row's own. It is called when engines end one request again
            and again and no other row is there to tell whether they answer at all.

    Attributes:
        retries: calls made again because an engine failed.
    """

    def __init__(
        self,
        retry_s: float,
        alive_s: Callable[[], float] = lambda: -math.inf,
        probe: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.retries = 0
        self._probe = probe
        self._probing = asyncio.Lock()
        self._retry_s = retry_s
        self._alive_s = alive_s
        self._answers = 0
        self._failing_since_s: float | None = None

    async def __call__(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Call until there is an answer, or none of all calls got one for ``retry_s``.

        Args:
            name: of the row, for errors.
            call: one attempt.

        Raises:
            RowRefused: the row is poison, or the engines end this request with an error and answer others.
            InvalidInput, UnknownModel, Unauthenticated: asking again is of no use.
            JobFailed: no engine could serve it in all that time.
        """
        again = AsyncRetryingCaller(
            attempts=None,
            timeout=None,
            wait_initial=FIRST_BACKOFF_S,
            wait_max=LONGEST_BACKOFF_S,
            # All rows in flight fail at the same moment, and need not come back at the same.
            wait_jitter=FIRST_BACKOFF_S,
        )
        return await again(_comes_again, self._once, _Row(name), call)

    async def _once(self, row: _Row, call: Callable[[], Awaitable[T]]) -> T:
        try:
            answer = await call()
        except FINAL:
            raise
        except KillsReplicas as error:
            raise RowRefused(Reason.POISON, error.message) from None
        except Overloaded:
            # Being told to wait is no failure: online traffic goes first, for as long as it takes.
            self._failing_since_s = None
            _note_wait("Overloaded")
            raise
        except Exception as error:
            _note_wait(kind_name(error))
            if isinstance(error, RequestFailed) or not isinstance(error, AWAY):
                await self._refuse_after(row, error)
            self._give_up_after(row.name, error)
            self.retries += 1
            raise
        self._answers += 1
        self._failing_since_s = None
        return answer

    async def _refuse_after(self, row: _Row, error: Exception) -> None:
        if not row.failures:
            row.answers_before = self._answers
        row.failures += 1
        # An engine that fails everything is not this row's fault.
        if row.failures >= MOST_FAILURES and await self._others_are_answered(row):
            raise RowRefused(Reason.REFUSED, f"{_told(error)}, {row.failures} times") from None

    async def _others_are_answered(self, row: _Row) -> bool:
        async with self._probing:
            if self._answers == row.answers_before and self._probe is not None:
                with contextlib.suppress(Exception):
                    await self._probe()
                    self._answers += 1
            return self._answers > row.answers_before

    def _give_up_after(self, name: str, error: Exception) -> None:
        now_s = time.monotonic()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        self._failing_since_s = max(self._failing_since_s, self._alive_s())
        if now_s - self._failing_since_s >= self._retry_s:
            raise JobFailed(f"row {name}: no engine could serve it for {self._retry_s:g} s: {_told(error)}") from None


def _note_wait(reason: str) -> None:
    if (timeline := current.get()) is not None:
        timeline.note("waiting", reason=reason)


def _comes_again(error: BaseException) -> float | bool:
    # A cancellation is no Exception; stamina asks about it all the same.
    return isinstance(error, Exception) and not isinstance(error, FINAL) and as_told(error)


def _told(error: Exception) -> str:
    return error.message if isinstance(error, HyclusterError) else f"{type(error).__name__}: {error}"


def first_error(errors: BaseException) -> BaseException:
    """The first real error of a group, however deep."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
