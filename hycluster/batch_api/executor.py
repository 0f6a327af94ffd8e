"""The process that runs batches: a Ray Serve deployment of one replica.

Its own process, so that no batch slows an ingress process's streams down. It finds its work in the store, whatever
has died meanwhile: itself, the ingress processes, the whole service. vLLM is imported and gateways are opened when
the first batch has something to ask; until then it costs a look at one folder a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from functools import partial
from typing import Self

from hycluster import logs
from hycluster.auth.caller import recorded
from hycluster.auth.guard import open_guard
from hycluster.batch_api.ledger_lines import LedgerLines
from hycluster.batch_api.lines import BatchEngines
from hycluster.batch_api.runner import Runner
from hycluster.batch_api.store import Store
from hycluster.directory.directory import open_directory
from hycluster.errors import NotFound
from hycluster.gateway.bulk import BulkLane
from hycluster.imports import without_collector
from hycluster.ledger.books import books_of
from hycluster.ledger.keeper import PriceList
from hycluster.limits.limiter import open_limiter
from hycluster.observe.export import Export
from hycluster.observe.request_log import log_requests
from hycluster.observe.timelines import recorder
from hycluster.settings.load import Admission
from hycluster.settings.settings import Settings
from hycluster.watchdog import Watchdog

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 3600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
# After its window a batch must come to an end, if need be a bad one.
GRACE_S = 3600.0


class BatchExecutor:
    """Runs the batches of the store from when it is made.

    Args:
        directory: name of the directory to follow.
    """

    def __init__(self, settings: Settings, directory: str) -> None:
        assert settings.batches is not None
        logs.settle("batches")
        self._settings = settings
        self._batches = settings.batches
        self._directory = directory
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._watchdog = Watchdog()
        open_directory(directory)
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import uvloop

        with contextlib.suppress(asyncio.CancelledError):
            uvloop.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        store = Store(self._batches)
        export = Export(recorder, self._settings.tracing)
        log_requests(recorder, self._settings.logs)
        try:
            async with _Api(self._settings, self._directory) as api:
                books = books_of(self._settings)
                ledger = LedgerLines(books, PriceList(self._settings.models)) if books is not None else None
                runner = Runner(store, self._batches, api.engines, self._settings.admission.max_members, ledger)
                await StoreWatch(store, runner, self._batches.concurrent_batches, self._batches.poll_s).run()
        finally:
            export.close()

    def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this executor."""
        if not self._thread.is_alive():
            raise RuntimeError("the batches' thread has ended")

    async def __del__(self) -> None:
        """Ray Serve awaits this when it stops the executor. What is not committed is done by the next one."""
        if self._loop is not None and self._main is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended already
                self._loop.call_soon_threadsafe(self._main.cancel)
            await asyncio.to_thread(self._thread.join, 10)


class StoreWatch:
    """Looks into the store for batches to do, and runs so many at once, by turns of the projects that have some: else
    one's many would keep others' from beginning. A project's own begin oldest first."""

    def __init__(self, store: Store, runner: Runner, at_once: int, poll_s: float) -> None:
        self._store = store
        self._runner = runner
        self._at_once = at_once
        self._poll_s = poll_s
        self._running: dict[str, asyncio.Task[None]] = {}
        # Of open batches, whose they are; and of these, when the last one of theirs began.
        self._owners: dict[str, str] = {}
        self._begun: dict[str, int] = {}
        self._turn = 0
        # When a batch that failed is tried again, and how long it waits the next time.
        self._pauses: dict[str, tuple[float, float]] = {}
        self._swept_s = float("-inf")

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    await self._look(group)
                except Exception:
                    logger.warning("batches.store: can't be read; trying again", exc_info=True)
                await asyncio.sleep(self._poll_s)

    async def _look(self, group: asyncio.TaskGroup) -> None:
        if time.monotonic() - self._swept_s >= SWEEP_EVERY_S:
            self._swept_s = time.monotonic()
            await asyncio.to_thread(self._store.sweep)
        now = time.monotonic()
        left = await asyncio.to_thread(self._store.open_batches)
        there = {*left}
        self._owners = {batch_id: owner for batch_id, owner in self._owners.items() if batch_id in there}
        owners = {*self._owners.values()}
        self._begun = {owner: turn for owner, turn in self._begun.items() if owner in owners}
        due = [each for each in left if each not in self._running and self._pauses.get(each, (now, 0.0))[0] <= now]
        while due and len(self._running) < self._at_once:
            batch_id = due[0]
            if len(due) > self._at_once - len(self._running):
                await asyncio.to_thread(self._learn_owners, [*due, *self._running])
                batch_id = min(due, key=self._place)
            due.remove(batch_id)
            self._turn += 1
            self._begun[self._owners.get(batch_id, "")] = self._turn
            self._running[batch_id] = group.create_task(self._attempt(batch_id))

    def _learn_owners(self, batch_ids: list[str]) -> None:
        for batch_id in batch_ids:
            if batch_id not in self._owners:
                # Whose mark is written before it.
                with contextlib.suppress(NotFound):
                    caller = recorded(self._store.batch(batch_id).caller)
                    self._owners[batch_id] = caller.owner if caller is not None else ""

    def _place(self, batch_id: str) -> tuple[int, int, str]:
        owner = self._owners.get(batch_id, "")
        running = sum(self._owners.get(each, "") == owner for each in self._running)
        return running, self._begun.get(owner, 0), batch_id

    async def _attempt(self, batch_id: str) -> None:
        try:
            await self._runner.run(batch_id)
            self._pauses.pop(batch_id, None)
        except Exception as error:
            _, pause_s = self._pauses.get(batch_id, (0.0, FIRST_PAUSE_S))
            logger.warning("batch %s: trying again in %g s: %s", batch_id, pause_s, error, exc_info=True)
            self._pauses[batch_id] = time.monotonic() + pause_s, min(2 * pause_s, LONGEST_PAUSE_S)
            # The store may be what fails.
            with contextlib.suppress(Exception):
                batch = await asyncio.to_thread(self._store.batch, batch_id)
                if time.time() > batch.expires_at + GRACE_S:
                    await self._runner.fail(batch_id, error)
        finally:
            del self._running[batch_id]


class _Api:
    """vLLM's API apps over gateways of this process, opened at the first use."""

    def __init__(self, settings: Settings, directory: str) -> None:
        self._settings = settings
        self._directory = directory
        self._opening = asyncio.Lock()
        self._engines: BatchEngines | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def engines(self) -> BatchEngines:
        """The app that an ingress process would have, and what bounds the lines that are sent to it.

        Raises:
            Unavailable: a model has no replica that can serve.
        """
        async with self._opening:
            if self._engines is None:
                self._engines = await self._open()
        return self._engines

    async def _open(self) -> BatchEngines:
        # Half a minute and half a gigabyte.
        await asyncio.to_thread(_import_vllm)
        from hycluster.gateway.generation import open_generators
        from hycluster.ingress.http import model_apps, over_all_models
        from hycluster.responses.app import WithResponses
        from hycluster.responses.process import response_store

        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            generator = await stack.enter_async_context(
                open_generators(
                    self._directory,
                    settings.models,
                    router=settings.router,
                    # What bounds batches are their lanes, and ``lines_in_flight``.
                    admission=Admission(max_requests=None),
                    wait_s=settings.start_timeout_s,
                    metrics=False,
                    patient=True,
                )
            )
            guard = await stack.enter_async_context(open_guard(settings.auth))
            generator.limiter = await stack.enter_async_context(
                open_limiter(guard.keyring if guard else None, partial(open_directory, self._directory))
            )
            apps = await model_apps(generator, settings.http, settings.admission.max_members)
            self._stack.push_async_exit(stack.pop_all())

        def lane(model: str, batch: str) -> BulkLane | None:
            known = generator.model_of(model)
            return generator.lane(known, batch) if known is not None else None

        # A line may go on from a stored response; what it is answered is in the batch's output, and kept nowhere else.
        app = WithResponses(
            over_all_models(apps, generator),
            response_store(settings),
            None,
            settings.http,
            settings.admission.max_members,
        )
        return BatchEngines(app, lane)


def _import_vllm() -> None:
    with without_collector():
        import hycluster.ingress.http  # noqa: F401
