"""The callers: so many at a time, each patient, each asking again what was not begun or whose ingress process went
away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from hycluster.chaos.ask import ConnectionLost, Reading, Reply, Trace, by_grpc, by_http
from hycluster.chaos.requests import Request
from hycluster.errors import HyclusterError, Overloaded, Unavailable
from hycluster.retries import as_told, retry_context

# Between two attempts, where the ingress process does not say; up to twice that.
PAUSE_S = 0.5


@dataclass(slots=True)
class Outcome:
    """What became of a request.

    Attributes:
        error: why there is no answer.
        restarts: how often its connection was lost and it was asked again from the start.
        refusals: how often it was refused (429, 503) before a token came, and asked again.
    """

    request: Request
    trace: Trace = field(default_factory=Trace)
    answer: Reply | None = None
    error: str | None = None
    restarts: int = 0
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class LoadCaller:
    """Asks one request until it has an answer, or until it is out of patience.

    Attributes:
        http, grpc: URL and ``host:port`` of the two ingresses.
        patience_s: for one request, all attempts together.
    """

    client: httpx.AsyncClient
    http: str
    grpc: str
    model: str
    patience_s: float

    async def ask(self, request: Request) -> Outcome:
        """What an ingress process says after the first token counts: such a stream is not asked again, it has
        failed."""
        outcome = Outcome(request)
        try:
            async with asyncio.timeout(self.patience_s):
                await self._ask(outcome)
        except TimeoutError:
            outcome.error = f"no whole answer after {self.patience_s:g} s"
        except HyclusterError as error:
            outcome.error = f"{type(error).__name__}: {error.message}"
        outcome.trace.ended_s = time.monotonic()
        return outcome

    async def _ask(self, outcome: Outcome) -> None:
        reading = Reading(outcome.trace)

        def again(error: Exception) -> float | bool:
            if isinstance(error, ConnectionLost):
                outcome.restarts += 1
            elif isinstance(error, Overloaded | Unavailable) and not reading.begun:
                outcome.refusals += 1
            else:
                return False
            return as_told(error)

        async for attempt in retry_context(
            again,
            attempts=None,
            timeout=None,
            wait_initial=PAUSE_S,
            wait_exp_base=1,
            wait_jitter=PAUSE_S,
            wait_max=2 * PAUSE_S,
        ):
            with attempt:
                reading = Reading(outcome.trace)
                if outcome.request.ingress == "http":
                    await by_http(self.client, self.http, self.model, outcome.request, reading)
                else:
                    await by_grpc(self.grpc, self.model, outcome.request, reading)
                outcome.answer = reading.whole(outcome.request)


Ask = Callable[[Request], Awaitable[Outcome]]


async def drive(ask: Ask, requests: Iterable[Request], concurrency: int) -> list[Outcome]:
    """Ask all of them, so many at a time; ``requests`` is read as there is room."""
    source, outcomes = iter(requests), list[Outcome]()

    async def caller() -> None:
        for request in source:
            outcomes.append(await ask(request))

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())
    return outcomes


def over_and_over(requests: Sequence[Request], over: Callable[[], bool]) -> Iterator[Request]:
    """Each once, and then again in turn until it is over."""
    yield from requests
    while not over():
        for request in requests:
            if over():
                return
            yield request
