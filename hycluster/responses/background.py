"""Responses that are answered with nobody on the line, by an ingress process or, when it has died, by another one.

vLLM's app is asked for a stream: its first event says that the request is right and what the response is going to be;
until then nothing is stored, and what refuses the request refuses it to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp

from hycluster.auth.caller import calling, recorded
from hycluster.errors import NotFound, Overloaded, Unavailable
from hycluster.ingress.in_process import InProcessAnswer, post
from hycluster.responses.events import EventReader, event_of
from hycluster.responses.records import FINAL_EVENTS, EndedResponse, StoredResponse, failed_response
from hycluster.responses.store import Claim, ResponseStore
from hycluster.settings.ingress import Responses
from hycluster.timeline import current

logger = logging.getLogger(__name__)

PATH = "/v1/responses"
OK = 200
# Come back later, in HTTP.
BUSY = (429, 503)
PAUSE_S = 1.0
# Between its last event and its end an answer has nothing left to compute.
LAST_WORDS_S = 5.0
# A stream's events lie in memory for so long before others can read them.
FLUSH_S = 0.5
# A response that so many ingress processes died over is not given to another one.
MOST_DEATHS = 3
SWEEP_EVERY_S = 3600.0


class Answering:
    """One that this process answers.

    Attributes:
        size: bytes that it was asked.
        models: what finds its model leaves the name there.
        began: what the caller is told first; an answer if the request is refused.
        stored: from when on others know of it.
        events: of its stream, as callers see them.
        over: no more of them will come.
    """

    def __init__(self, size: int, models: list[str]) -> None:
        self.size = size
        self.models = models
        self.began: asyncio.Future[dict[str, Any] | InProcessAnswer] = asyncio.get_running_loop().create_future()
        self.stored = asyncio.Event()
        self.events: list[dict[str, Any]] = []
        self.over = False
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def say(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._news.set()

    def end(self) -> None:
        self.over = True
        self._news.set()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """The events from the first one on, for one reader."""
        told = 0
        while True:
            self._news.clear()
            while told < len(self.events):
                told += 1
                yield self.events[told - 1]
            if self.over:
                return
            await self._news.wait()


class Background:
    """All of them in this process; ``run`` must be running.

    Args:
        app: vLLM's app over all models.
        retry_for_s: how long one that was taken over waits for engines that have no time for it, or are not there.
        max_bytes: of what all of them are asked.
    """

    def __init__(
        self, app: ASGIApp, store: ResponseStore, settings: Responses, *, retry_for_s: float, max_bytes: int
    ) -> None:
        self.holder = uuid.uuid4().hex
        self._app = app
        self._store = store
        self._settings = settings
        self._retry_for_s = retry_for_s
        self._max_bytes = max_bytes
        self._running: dict[str, Answering] = {}
        self._beats = 0
        # By holder, what was last read of it and since when it is the same.
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._closing = False

    async def run(self) -> None:
        """Show that this process lives and look after what others have left; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_each(self._settings.lease_s / 4, self._show_life))
            group.create_task(_each(self._settings.poll_s, self._look))
            group.create_task(_each(SWEEP_EVERY_S, lambda: asyncio.to_thread(self._store.sweep)))

    async def begin(
        self,
        record: Callable[[dict[str, Any]], StoredResponse],
        response_id: str,
        asked: dict[str, Any],
        models: list[str],
    ) -> tuple[StoredResponse, Answering] | InProcessAnswer:
        """Ask, and store what was begun; or the answer that refuses the request.

        Args:
            record: of what vLLM says of the response as it begins.
            models: what finds its model leaves the name there, for who counts requests.

        Raises:
            Overloaded: this process answers enough of them.
            OSError: it can't be stored.
        """
        size = len(json.dumps(asked))
        if self._closing or not self._has_room(size):
            raise Overloaded(
                f"background: this ingress process answers {len(self._running)} responses in the background; "
                f"responses.max_background allows {self._settings.max_background}, of {self._max_bytes} bytes together",
                retry_after_s=1,
            )
        answering = self._start(response_id, asked, record({"output": []}), size, models)
        try:
            began = await answering.began
            if isinstance(began, InProcessAnswer):
                return began
            stored = record(began)
            await self._show_life()
            await asyncio.to_thread(self._store.open, stored, self.holder)
        except BaseException:
            assert answering.task is not None
            answering.task.cancel()
            raise
        answering.stored.set()
        return stored, answering

    def drop(self, response_id: str) -> None:
        """It was cancelled or deleted by way of this process; one that another process answers hears by the store."""
        answering = self._running.get(response_id)
        if answering is not None and answering.stored.is_set() and answering.task is not None:
            answering.task.cancel()

    async def close(self, timeout_s: float) -> None:
        """Answer what is left within a time, then give back what is not, for others to answer. No new ones any more."""
        self._closing = True
        tasks = {i: answering.task for i, answering in self._running.items() if answering.task is not None}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=timeout_s)
        left = {response_id: task for response_id, task in tasks.items() if not task.done()}
        for task in left.values():
            task.cancel()
        await asyncio.gather(*left.values(), return_exceptions=True)
        with contextlib.suppress(OSError):
            if left:
                await asyncio.to_thread(self._give_back, set(left))
            await asyncio.to_thread(self._store.leave, self.holder)

    def _give_back(self, left: set[str]) -> None:
        claims = self._store.claims()
        for response_id in left & self._store.open_ids():
            mine = self._store.claim_of(response_id, claims.get(response_id, 0))
            if mine is not None and mine.holder == self.holder:
                self._store.claim(response_id, Claim(mine.number + 1, "", mine.deaths))

    def _has_room(self, size: int) -> bool:
        held = sum(answering.size for answering in self._running.values())
        return len(self._running) < self._settings.max_background and held + size <= self._max_bytes

    # -- one of them --------------------------------------------------------------------------------------

    def _start(
        self, response_id: str, asked: dict[str, Any], record: StoredResponse, size: int, models: list[str]
    ) -> Answering:
        self._running[response_id] = answering = Answering(size, models)
        answering.task = asyncio.create_task(self._answer(response_id, asked, record, answering))

        def ended(task: asyncio.Task[None]) -> None:
            del self._running[response_id]
            answering.end()
            error = None if task.cancelled() else task.exception()
            if error is not None:
                logger.warning("response %s: %s", response_id, error, exc_info=error)
            if not answering.began.done():
                answering.began.set_exception(error or Unavailable("the ingress process is being stopped"))
                # Nobody may be waiting.
                answering.began.exception()

        answering.task.add_done_callback(ended)
        return answering

    async def _answer(
        self, response_id: str, asked: dict[str, Any], record: StoredResponse, answering: Answering
    ) -> None:
        until, pause_s = time.monotonic() + self._retry_for_s, PAUSE_S
        frame = {name: record.response.get(name) for name in ("previous_response_id", "background", "store")}
        while True:
            try:
                ended = await self._listen(response_id, asked, frame, record, answering)
                break
            except _Refused as refused:
                if not answering.began.done() and not answering.stored.is_set():
                    answering.began.set_result(refused.answer)
                    return
                if refused.answer.status not in BUSY or time.monotonic() > until:
                    ended = failed_response(record.response, _message(refused.answer))
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 30)
        await answering.stored.wait()
        kept = answering.events if record.streamed else []
        await self._end(response_id, EndedResponse(response=ended, events=kept))

    async def _listen(
        self, response_id: str, asked: dict[str, Any], frame: dict[str, Any], record: StoredResponse,
        answering: Answering,
    ) -> dict[str, Any]:  # fmt: skip
        """Hear the answer out; the response as it ended."""
        began, why, flushed, flushed_s = record.response, "", 0, time.monotonic()
        pieces = 0
        async with contextlib.aclosing(_events(self._app, asked, response_id, answering.models)) as events:
            async for event in events:
                if isinstance(response := event.get("response"), dict):
                    response |= frame
                    began = response
                    if not answering.began.done():
                        answering.began.set_result(response)
                error = event.get("error")
                why = str(error.get("message")) if isinstance(error, dict) else why
                if "type" in event:
                    answering.say(event)
                if event.get("type") in FINAL_EVENTS and isinstance(response, dict):
                    return response
                if record.streamed and answering.stored.is_set() and time.monotonic() - flushed_s >= FLUSH_S:
                    new = answering.events[flushed:]
                    await asyncio.to_thread(self._store.add_events, response_id, pieces, new)
                    pieces, flushed, flushed_s = pieces + 1, flushed + len(new), time.monotonic()
        ended = failed_response(
            began, f"the answer ended early: {why or 'the engine or the ingress process broke it off'}"
        )
        number = answering.events[-1].get("sequence_number", 0) + 1 if answering.events else 0
        answering.say({"type": "response.failed", "sequence_number": number, "response": ended})
        return ended

    async def _end(self, response_id: str, ended: EndedResponse) -> None:
        """Store the end, however long that takes: until then it is being answered, as this process lives."""
        pause_s = PAUSE_S
        while True:
            try:
                await asyncio.to_thread(self._store.end, response_id, ended)
                return
            except OSError as error:
                logger.warning("response %s: its end can't be stored, trying again: %s", response_id, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 30)

    # -- all of them ----------------------------------------------------------------------------------------

    async def _show_life(self) -> None:
        if self._running:
            self._beats += 1
            await asyncio.to_thread(self._store.beat, self.holder, self._beats)

    async def _look(self) -> None:
        mine = [response_id for response_id, answering in self._running.items() if answering.stored.is_set()]
        being_answered = await asyncio.to_thread(self._store.open_ids)
        for response_id in mine:
            if response_id not in being_answered:
                # Cancelled, at whichever ingress process, or deleted.
                self.drop(response_id)
        others = being_answered - self._running.keys()
        if not others or self._closing:
            return
        claims = await asyncio.to_thread(self._store.claims)
        for response_id in sorted(others):
            claim = await asyncio.to_thread(self._store.claim_of, response_id, claims.get(response_id, 0))
            if claim is not None and await self._is_lost(claim.holder):
                await self._take_over(response_id, claim)

    async def _is_lost(self, holder: str) -> bool:
        """Clocks of machines are not compared: what has not changed by ours."""
        beat = await asyncio.to_thread(self._store.last_beat, holder) if holder else None
        if beat is None:
            return True
        seen, since_s = self._seen.get(holder, (b"", 0.0))
        if beat != seen:
            self._seen[holder] = beat, time.monotonic()
            return False
        return time.monotonic() - since_s > self._settings.lease_s

    async def _take_over(self, response_id: str, claim: Claim) -> None:
        size = await asyncio.to_thread(self._store.size, response_id)
        if not self._has_room(size):
            return
        deaths = claim.deaths + bool(claim.holder)
        self._beats += 1
        await asyncio.to_thread(self._store.beat, self.holder, self._beats)
        if not await asyncio.to_thread(self._store.claim, response_id, Claim(claim.number + 1, self.holder, deaths)):
            return
        try:
            record = await asyncio.to_thread(self._store.get, response_id)
        except NotFound:
            await asyncio.to_thread(self._store.close, response_id)
            return
        if await asyncio.to_thread(self._store.ended, response_id) is not None or record.asked is None:
            await asyncio.to_thread(self._store.close, response_id)
            return
        left = "died" if claim.holder else "was stopped"
        if deaths >= MOST_DEATHS:
            why = f"{deaths} ingress processes died while they answered it"
        elif record.streamed:
            why = f"the ingress process that streamed it {left}"
        else:
            logger.warning("response %s: its ingress process %s; answering it here", response_id, left)
            with calling(recorded(record.caller)):
                self._start(response_id, record.asked, record, size, []).stored.set()
            return
        ended = failed_response(record.response, why)
        events = await asyncio.to_thread(self._store.all_events, response_id) if record.streamed else []
        await self._end(response_id, EndedResponse(response=ended, events=[*events, final_event(ended, events)]))


def final_event(response: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """What ends a stream that did not come to its own end."""
    kind = "response.failed" if response["status"] == "failed" else "response.incomplete"
    number = events[-1].get("sequence_number", 0) + 1 if events else 0
    return {"type": kind, "sequence_number": number, "response": response}


class _Refused(Exception):
    def __init__(self, answer: InProcessAnswer) -> None:
        super().__init__(answer.status)
        self.answer = answer


async def _events(app: ASGIApp, asked: dict[str, Any], once: str, models: list[str]) -> AsyncGenerator[dict[str, Any]]:
    """The events of the app's answer.

    Raises:
        _Refused: it is none that has events.
    """
    heard: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    reader, refusal, status = EventReader(), bytearray(), 0

    def hear(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif status != OK:
            refusal.extend(message.get("body", b""))
        else:
            for raw in reader.read(message.get("body", b"")):
                if (event := event_of(raw)) is not None:
                    heard.put_nowait(event)

    # A request of its own, though of the same trace: the one that began it ends when it is told so.
    begun, apart = current.get(), contextvars.copy_context()
    apart.run(current.set, None)
    headers = {"content-type": "application/json", "x-request-id": begun.id if begun else once}
    if begun is not None and begun.sampled:
        headers |= begun.context.headers
    answer_to = post(app, PATH, json.dumps(asked).encode(), headers, heard=hear, once=once, models=models)
    asking = asyncio.create_task(answer_to, context=apart)
    asking.add_done_callback(lambda _: heard.put_nowait(None))
    event: dict[str, Any] | None = None
    try:
        while (event := await heard.get()) is not None:
            yield event
        answer = asking.result()
        if status != OK:
            raise _Refused(InProcessAnswer(answer.status, answer.headers, bytes(refusal)))
    finally:
        if event is not None and event.get("type") in FINAL_EVENTS:
            # Its last words are still on the way; one that is ended now has been left.
            await asyncio.wait({asking}, timeout=LAST_WORDS_S)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


def _message(answer: InProcessAnswer) -> str:
    try:
        return str(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the model's app answered {answer.status}"


async def _each(interval_s: float, work: Callable[[], Awaitable[Any]]) -> None:
    while True:
        try:
            await work()
        except Exception:
            logger.warning("batches.store: responses can't be looked after; trying again", exc_info=True)
        await asyncio.sleep(interval_s)
