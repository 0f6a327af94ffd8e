"""What a job of the running service asks: its ingress at once, and a gateway of the job's own once that is open.

vLLM's import and a gateway's opening take half a minute, and a small job would be done by then. So its first rows go
through an ingress process, which has all that is needed, by gRPC; few at a time, for it has its own streams to serve.
After some seconds the job's process begins to open its own gateway; what is asked after that goes there, and what is
under way is left where it is. What gRPC can't carry, and all rows once the ingress has failed one, wait for the
gateway. So whatever becomes of the ingress process, a job ends as if there had been none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import TypeVar, Unpack

from hycluster.batch.task import JobBackend, Places
from hycluster.client import AsyncClient
from hycluster.core import Generation, GenerationRequest, ModelCard, PromptFields
from hycluster.errors import (
    HyclusterError,
    InvalidInput,
    JobFailed,
    KillsReplicas,
    Overloaded,
    RequestFailed,
    UnknownModel,
    kind_name,
)
from hycluster.gateway.bulk import FIXED_ROWS, BulkLanes
from hycluster.ingress import arguments, translate
from hycluster.remote import Remote

# A job that is through by then opens no gateway.
OWN_AFTER_S = 5.0
# Rows that a job has at an ingress process at a time.
EARLY_ROWS = 32
# What is longer is not sent there: a message holds 32 MiB, and another process's time is taken to render it.
MOST_CHARACTERS = 1_000_000
# What a row would hear of the job's own gateway, too.
STANDS = (InvalidInput, KillsReplicas, Overloaded, RequestFailed)
log = logging.getLogger(__name__)

T = TypeVar("T")
# Imports what it needs, in the thread that calls it, and returns a gateway to be opened.
Own = Callable[[], AbstractAsyncContextManager[JobBackend]]


@asynccontextmanager
async def open_first_rows(address: str, own: Own, own_after_s: float = OWN_AFTER_S) -> AsyncIterator[FirstRows]:
    """Ask the ingress at ``address``, and a gateway of one's own as soon as there is one."""
    async with AsyncClient(address) as client:
        rows = FirstRows(client)
        opening = asyncio.create_task(rows.open_own(own, own_after_s))
        try:
            yield rows
        finally:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)


class FirstRows:
    """A job's backend, first by way of an ingress process; see :func:`open_first_rows`."""

    def __init__(self, client: AsyncClient) -> None:
        self._early = Remote(client, _once)
        self._loop = asyncio.get_running_loop()
        self._own: asyncio.Future[JobBackend] = self._loop.create_future()
        self._wanted = asyncio.Event()
        self._left = False
        self._places: list[_Places] = []

    async def open_own(self, own: Own, own_after_s: float) -> None:
        """Keep a gateway of one's own open from when it is wanted, or after so many seconds; until cancelled."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wanted.wait(), own_after_s)
        try:
            async with await asyncio.to_thread(own) as backend:
                self._own.set_result(backend)
                for places in self._places:
                    places.move(backend)
                await asyncio.Event().wait()
        except Exception as error:
            if self._own.done():
                raise
            log.warning("the job's own gateway can't be opened", exc_info=True)
            self._left = True
            kept = isinstance(error, UnknownModel | InvalidInput)
            told = error.message if isinstance(error, HyclusterError) else f"{type(error).__name__}: {error}"
            self._own.set_exception(error if kept else JobFailed(told))
            # It is read by whoever asks next, if anybody does.
            self._own.exception()

    @property
    def _by_ingress(self) -> bool:
        return not self._left and not self._own.done()

    async def _gateway(self) -> JobBackend:
        self._wanted.set()
        return await asyncio.shield(self._own)

    async def _asked(self, early: Callable[[], Awaitable[T]], own: Callable[[JobBackend], Awaitable[T]]) -> T:
        if self._by_ingress:
            try:
                return await early()
            except STANDS:
                raise
            except HyclusterError as error:
                self._leave(error)
        return await own(await self._gateway())

    def _leave(self, error: HyclusterError) -> None:
        if not self._left:
            log.warning("rows go through the ingress no more: %s: %s", kind_name(error), error.message)
        self._left = True

    async def models(self) -> list[ModelCard]:
        return await self._asked(self._early.models, lambda own: own.models())

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        return await self._asked(lambda: self._early.tokenize(model, **asked), lambda own: own.tokenize(model, **asked))

    def token_counter(self, model: str) -> Callable[[Sequence[str]], list[int]]:
        """Counts the tokens of many texts; for threads other than the event loop's."""
        early = self._early.token_counter(model)

        def count(texts: Sequence[str]) -> list[int]:
            if self._by_ingress:
                try:
                    return early(texts)
                except STANDS:
                    raise
                except HyclusterError as error:
                    self._leave(error)
            own = asyncio.run_coroutine_threadsafe(self._gateway(), self._loop).result()
            return own.token_counter(model)(texts)

        return count

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        if not _travels(request):
            own = await self._gateway()
            return await own.generate(request, deadline_s=deadline_s)
        job = self._places[0].job if self._places else None
        return await self._asked(
            lambda: self._early.generate(replace(request, job=job), deadline_s=deadline_s),
            lambda own: own.generate(request, deadline_s=deadline_s),
        )

    def lane(self, model: str, job: str, most: int | None = None, fixed: int = FIXED_ROWS) -> Places:
        places = _Places(model, job, most, fixed)
        self._places.append(places)
        if self._own.done():
            places.move(self._own.result())
        return places


class _Places:
    """A job's places: some at the ingress, which gives each row one of the engines' there; then the gateway's.

    Rows hold them, and it does not matter which: those at the ingress are given back first.
    """

    def __init__(self, model: str, job: str, most: int | None, fixed: int) -> None:
        self.job = job
        self._ask: tuple[str, str, int | None, int] = model, job, most, fixed
        self._early = BulkLanes().lane(job, min(most or EARLY_ROWS, EARLY_ROWS))
        self._own: Places | None = None
        self._moved = asyncio.Event()

    def move(self, gateway: JobBackend) -> None:
        """Take places of this gateway from now on."""
        self._own = gateway.lane(*self._ask)
        self._moved.set()

    @property
    def starved(self) -> bool:
        return self._own is not None and self._own.starved

    @property
    def alive_s(self) -> float:
        return self._early.alive_s if self._own is None else self._own.alive_s

    async def acquire(self) -> None:
        if self._own is None and await self._acquire_early():
            return
        assert self._own is not None
        await self._own.acquire()

    async def _acquire_early(self) -> bool:
        """A place at the ingress, unless the gateway opens before there is one."""
        place, moved = (asyncio.ensure_future(wait()) for wait in (self._early.acquire, self._moved.wait))
        try:
            await asyncio.wait({place, moved}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not place.cancel():
                self._early.release()
            raise
        finally:
            moved.cancel()
        # A place that comes in the moment of its cancellation is given back.
        return not place.cancel()

    def take(self) -> None:
        (self._own or self._early).take()

    def release(self) -> None:
        if self._own is None or self._early.held:
            self._early.release()
        else:
            self._own.release()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


async def _once(name: str, call: Callable[[], Awaitable[T]]) -> T:
    return await call()


def _travels(request: GenerationRequest) -> bool:
    """Whether gRPC carries it as it is; else a row's prompt would depend on the way that it goes."""
    try:
        arguments.check_arguments(messages=request.messages)
        carried = translate.request_from_pb(translate.request_to_pb(request))
    except InvalidInput:
        return False
    if carried != request:
        return False
    texts = [request.prompt or "", *(str(turn.get("content", "")) for turn in request.messages or ())]
    return sum(map(len, texts)) <= MOST_CHARACTERS
