"""The layer before vLLM's app: what a request refers to is put into it, and what is to be kept of its answer is kept.

vLLM has a store of its own, in one process' memory and without bounds, off unless an environment variable is set. It is
never asked to use it: each request that reaches vLLM's app has all that it needs in its ``input``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hycluster.auth.caller import caller_now
from hycluster.errors import HyclusterError, InvalidInput, NotFound, Overloaded, Unavailable, shown
from hycluster.ingress.errors import answer_error
from hycluster.ingress.in_process import InProcessAnswer
from hycluster.ingress.metrics import MODEL_KEY
from hycluster.ledger.account import account_now
from hycluster.responses.background import PATH, Answering, Background
from hycluster.responses.events import EventReader, as_sse, event_of
from hycluster.responses.records import ANSWERED, FINAL_EVENTS, StoredResponse, as_items, new_response_id
from hycluster.responses.routes import response_routes
from hycluster.responses.store import ResponseStore
from hycluster.settings.ingress import Http
from hycluster.settings.load import MAX_MEMBERS
from hycluster.storage import masked_line

logger = logging.getLogger(__name__)

NO_STORE = "no responses are stored here: 'responses' or 'batches' of the settings is null"
BATCH_LINE = "it is a line of a batch; the batch's output file has what it is answered"
# What stands for an item that OpenAI has stored: here whole responses are.
REFERENCE = "item_reference"
OK = 200


@dataclass(frozen=True, slots=True)
class AskedResponse:
    """A request as it goes on to vLLM's app.

    Attributes:
        body: without any reference to what is stored.
        items: its whole input; empty if it is none.
        given: what it said itself that vLLM does not hear of.
        store: whether its answer is kept.
    """

    body: dict[str, Any]
    items: list[dict[str, Any]]
    given: dict[str, Any]
    store: bool

    def response(self, told: dict[str, Any]) -> dict[str, Any]:
        """What vLLM says of the response, with what it has not been told."""
        return {**told, **self.given, "store": self.store}

    def record(self, told: dict[str, Any]) -> StoredResponse:
        return StoredResponse(
            id=self.body["request_id"], items=self.items, response=self.response(told), caller=caller_now()
        )


class WithResponses:
    """ASGI app: everything below ``/v1/responses`` goes through here, the rest to ``app``.

    Args:
        app: vLLM's app over all models.
        store: None if there is none.
        background: None where nothing is answered in the background or kept: lines of a batch.

    Attributes:
        routes: what asks for one that is kept.
    """

    def __init__(
        self,
        app: ASGIApp,
        store: ResponseStore | None,
        background: Background | None,
        http: Http,
        max_members: int = MAX_MEMBERS,
    ) -> None:
        self._app = app
        self._store = store
        self._background = background
        self._most_bytes = http.max_body_mib << 20
        self._most_bytes_together = http.max_bodies_mib << 20
        # As many as one request could have brought: an item has three members and more.
        self._most_items = max_members // 3
        self._held = 0
        self._not_kept = NO_STORE if store is None else BATCH_LINE if background is None else None
        self.routes: FastAPI | None = None
        if store is not None:
            self.routes = response_routes(store, *([background.drop] if background is not None else []))
        self._sweeping: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
        elif scope["path"] == PATH and scope["method"] == "POST":
            await self._create(scope, receive, send)
        elif scope["path"].startswith(f"{PATH}/") and scope["path"].count("/") > 2:
            routes = self.routes or await answer_error(None, NotFound(f"response_id: {NO_STORE}"))
            await routes(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages, body = [], bytearray()
        while True:
            messages.append(message := await receive())
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        given = _object(bytes(body))
        if given is None:
            # Not a request; vLLM says so.
            await self._app(scope, _replayed(messages, receive), send)
            return
        held = 0
        try:
            held, asked = await self._understand(given)
            if asked.given.get("background"):
                answer = await self._in_background(
                    asked, scope.get(MODEL_KEY, []), streamed=given.get("stream") is True
                )
                await answer(scope, receive, send)
                return
            data = json.dumps(asked.body).encode()
            headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(data))]}
            asking: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]
            await self._app(scope, _replayed(asking, receive), _Kept(self, asked, send))
        except HyclusterError as error:
            await (await answer_error(None, error))(scope, receive, send)
        finally:
            self._held -= held

    # -- what is asked --------------------------------------------------------------------------------------

    async def _understand(self, given: dict[str, Any]) -> tuple[int, AskedResponse]:
        """The request for vLLM's app, and how many stored bytes are in memory for it.

        Raises:
            HyclusterError: it can't be answered as it is meant.
        """
        self._check(given)
        body = {**given, "store": False}
        body.pop("background", None)
        previous_id = body.pop("previous_response_id", None)
        items = as_items(given.get("input"))
        before, held = None, 0
        if previous_id is not None:
            held, before = await self._previous(previous_id)
            if isinstance(items, list):
                items = [*before.conversation, *items]
                if len(items) > self._most_items:
                    raise InvalidInput(
                        f"previous_response_id: {shown(previous_id)} makes an input of {len(items)} items; at most"
                        f" {self._most_items} are allowed"
                    )
                body["input"] = items
            if body.get("model") is None:
                body["model"] = before.response.get("model")
        # A name that the caller has chosen might be another one's.
        keeps = self._not_kept is None and given.get("store", True) is not False and given.get("request_id") is None
        if keeps:
            body["request_id"] = new_response_id()
        told = {"previous_response_id": previous_id, "background": given.get("background") is True}
        return held, AskedResponse(body, items if isinstance(items, list) else [], told, keeps)

    def _check(self, given: dict[str, Any]) -> None:
        """What can't be done is not left out silently."""
        wants, background = given.get("store"), given.get("background") is True
        if background and wants is False:
            raise InvalidInput("background: true is not allowed with 'store': false; its answer has to be kept")
        for name, value in (("store", wants is True), ("background", background)):
            if value and self._not_kept is not None:
                raise InvalidInput(f"{name}: true is not allowed; {self._not_kept}")
            if value and given.get("request_id") is not None:
                raise InvalidInput(f"request_id: {shown(given['request_id'])} is not allowed for what is stored")
        if given.get("conversation") is not None:
            raise InvalidInput("conversation: there are none here; use 'previous_response_id'")
        for number, item in enumerate(given["input"] if isinstance(given.get("input"), list) else ()):
            if isinstance(item, dict) and item.get("type") == REFERENCE:
                raise InvalidInput(
                    f"input[{number}].type: {REFERENCE!r} is not allowed; send the item itself, as clients do with "
                    "'store': false, or go on from its response by 'previous_response_id'"
                )
        if given.get("previous_response_id") is not None and given.get("previous_input_messages"):
            raise InvalidInput("previous_response_id, previous_input_messages: at most one may be set")

    async def _previous(self, previous_id: Any) -> tuple[int, StoredResponse]:
        """What is gone on from, and its bytes, which count as in work from now on."""
        field = f"previous_response_id: {shown(previous_id)}"
        if self._store is None:
            raise NotFound(f"{field} is not here; {NO_STORE}")
        if not isinstance(previous_id, str):
            raise InvalidInput(f"{field} is not allowed; must be a response's id")
        with _translated():
            size = await asyncio.to_thread(self._store.size, previous_id)
        if size > self._most_bytes:
            raise InvalidInput(f"{field} is with what came before it over the limit of {self._most_bytes} bytes")
        if self._held + size > self._most_bytes_together:
            most = self._most_bytes_together
            raise Overloaded(
                f"previous_response_id: those of all requests in work are over the limit of {most} bytes",
                retry_after_s=1,
            )
        self._held += size
        try:
            with _translated():
                record = await asyncio.to_thread(self._store.get, previous_id)
            if (status := record.response.get("status")) not in ANSWERED:
                raise InvalidInput(f"{field} is {status}; only one that was answered can be gone on from")
        except BaseException as error:
            self._held -= size
            if isinstance(error, NotFound):
                raise NotFound(f"{field} is not here; it was not stored, or has been deleted") from None
            raise
        return size, record

    # -- what is answered -----------------------------------------------------------------------------------

    async def _in_background(self, asked: AskedResponse, models: list[str], *, streamed: bool) -> ASGIApp:
        assert self._background is not None
        again = {**asked.body, "stream": True}

        def record(told: dict[str, Any]) -> StoredResponse:
            return asked.record(told).model_copy(update={"asked": again, "streamed": streamed})

        with _translated():
            begun = await self._background.begin(record, asked.body["request_id"], again, models)
        if isinstance(begun, InProcessAnswer):
            return _Passed(begun)
        stored, answering = begun
        self._sweep_if_due()
        if not streamed:
            return JSONResponse(stored.response)
        return StreamingResponse(self._live(stored.id, answering), media_type="text/event-stream")

    async def _live(self, response_id: str, answering: Answering) -> AsyncIterator[bytes]:
        last = None
        async for event in answering.follow():
            last = event
            yield as_sse(event)
        if last is None or last.get("type") not in FINAL_EVENTS:
            # Ended by somebody else.
            assert self._store is not None
            ended = await asyncio.to_thread(self._store.ended, response_id)
            if ended is not None and ended.events:
                yield as_sse(ended.events[-1])

    async def keep(self, asked: AskedResponse, told: dict[str, Any]) -> dict[str, Any]:
        """The response as its caller sees it, which says whether it could be kept."""
        response = asked.response(told)
        if not asked.store:
            return response
        assert self._store is not None
        if (account := account_now.get()) is not None:
            # Who asks for what is kept has it too.
            account.settle()
        try:
            await asyncio.to_thread(self._store.put, asked.record(told))
        except OSError as error:
            # It has been paid for.
            logger.warning("response %s is answered and not kept: %s", response["id"], masked_line(error))
            return {**response, "store": False}
        self._sweep_if_due()
        return response

    def _sweep_if_due(self) -> None:
        assert self._store is not None
        if self._store.sweep_is_due and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = asyncio.ensure_future(self._sweep())

    async def _sweep(self) -> None:
        assert self._store is not None
        try:
            # What is stored meanwhile may have come too late to be seen.
            while self._store.sweep_is_due:
                await asyncio.to_thread(self._store.sweep)
        except OSError as error:
            logger.warning("batches.store: old responses can't be deleted: %s", masked_line(error))


class _Kept:
    """``send`` of vLLM's app: keeps the response on its way, before its caller knows that it is whole."""

    def __init__(self, layer: WithResponses, asked: AskedResponse, send: Send) -> None:
        self._layer = layer
        self._asked = asked
        self._send = send
        self._start: Message = {}
        self._reader: EventReader | None = None
        self._whole: bytearray | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if message["status"] == OK and kind.startswith(b"text/event-stream"):
                self._reader = EventReader()
            elif message["status"] == OK:
                self._start, self._whole = message, bytearray()
                return
            await self._send(message)
        elif self._reader is not None:
            await self._send({**message, "body": await self._events(self._reader, message)})
        elif self._whole is not None:
            self._whole += message.get("body", b"")
            if not message.get("more_body"):
                await self._answer(bytes(self._whole))
        else:
            await self._send(message)

    async def _events(self, reader: EventReader, message: Message) -> bytes:
        ready = b""
        for raw in reader.read(message.get("body", b"")):
            # Most are of a few letters, and go on as they are.
            event = event_of(raw) if b'"response":' in raw else None
            response = event.get("response") if event is not None else None
            if event is None or not isinstance(response, dict):
                ready += raw
                continue
            final = event.get("type") in FINAL_EVENTS
            told = await self._layer.keep(self._asked, response) if final else self._asked.response(response)
            ready += as_sse({**event, "response": told})
        return ready if message.get("more_body") else ready + reader.left()

    async def _answer(self, body: bytes) -> None:
        told = _object(body)
        if told is not None and told.get("object") == "response":
            body = json.dumps(await self._layer.keep(self._asked, told)).encode()
        headers = [(k, v) for k, v in self._start.get("headers", ()) if k.lower() != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


class _Passed:
    """What vLLM's app said, as it is."""

    def __init__(self, answer: InProcessAnswer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        await send({"type": "http.response.start", "status": answer.status, "headers": list(answer.headers.raw)})
        await send({"type": "http.response.body", "body": answer.body})


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"batches.store: can't be used now: {masked_line(error)}", retry_after_s=5) from error


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    replay = iter(messages)

    async def replayed() -> Message:
        return next(replay, None) or await receive()

    return replayed
