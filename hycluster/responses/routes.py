"""What asks for a stored response: at any ingress process, whichever answered it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from hycluster.errors import HyclusterError, InvalidInput, NotFound, Unavailable, shown
from hycluster.ingress.errors import answer_error, answer_http_error, openai_error
from hycluster.responses.background import PATH, final_event
from hycluster.responses.events import as_sse
from hycluster.responses.records import FINAL_STATUSES, EndedResponse, Item, StoredResponse
from hycluster.responses.store import ResponseStore
from hycluster.storage import masked_line

MAX_LISTED_ITEMS = 100
# How often a stream looks for what another process has written.
LOOK_S = 0.5


def response_routes(store: ResponseStore, drop: Callable[[str], None] = lambda _: None) -> FastAPI:
    """The app of what is below ``/v1/responses``.

    Args:
        drop: told of what was ended while it was answered, maybe by this process.
    """
    app = FastAPI(title="hycluster", openapi_url=None, redirect_slashes=False)
    app.include_router(_responses(store, drop))
    app.add_exception_handler(HyclusterError, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_bad_query)
    app.add_exception_handler(OSError, _answer_no_store)
    return app


def _responses(store: ResponseStore, drop: Callable[[str], None]) -> APIRouter:
    routes = APIRouter(prefix=PATH)

    @routes.get("/{response_id}", response_model=None)
    async def retrieve(
        response_id: str, stream: bool = False, starting_after: Annotated[int | None, Query(ge=0)] = None
    ) -> dict[str, Any] | StreamingResponse:
        record = await asyncio.to_thread(store.get, response_id)
        if not stream:
            return record.response
        if not record.streamed:
            raise InvalidInput(
                f"stream: true is not allowed; {response_id!r} was not asked for with 'background' and 'stream'"
            )
        events = _replay(store, response_id, -1 if starting_after is None else starting_after)
        return StreamingResponse(events, media_type="text/event-stream")

    @routes.delete("/{response_id}")
    async def delete(response_id: str) -> dict[str, Any]:
        await asyncio.to_thread(store.get, response_id)
        await asyncio.to_thread(store.delete, response_id)
        drop(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.post("/{response_id}/cancel")
    async def cancel(response_id: str) -> dict[str, Any]:
        cancelled = await asyncio.to_thread(_cancel, store, response_id)
        if cancelled["status"] == "cancelled":
            drop(response_id)
        return cancelled

    @routes.get("/{response_id}/input_items")
    async def input_items(
        response_id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED_ITEMS)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        items = _named(await asyncio.to_thread(store.get, response_id))
        if order == "desc":
            items.reverse()
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise InvalidInput(f"after: {shown(after)} is no item of {response_id!r}")
        start = 0 if after is None else ids.index(after) + 1
        page = items[start : start + limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }

    return routes


def _cancel(store: ResponseStore, response_id: str) -> dict[str, Any]:
    record = store.get(response_id)
    if record.asked is None:
        raise InvalidInput(f"response_id: {response_id!r} was not asked for with 'background'; it can't be cancelled")
    if record.response["status"] not in FINAL_STATUSES:
        cancelled = {**record.response, "status": "cancelled"}
        events = store.all_events(response_id) if record.streamed else []
        last = [final_event(cancelled, events)] if record.streamed else []
        store.end(response_id, EndedResponse(response=cancelled, events=[*events, *last]))
        # Its answer may have been a moment sooner.
        record = store.get(response_id)
    if record.response["status"] not in ("cancelled", "in_progress", "queued"):
        raise InvalidInput(
            f"response_id: {response_id!r} is {record.response['status']}; it can't be cancelled any more"
        )
    return record.response


def _named(record: StoredResponse) -> list[Item]:
    """The items, each with an id; those that came with a text have none."""
    name = record.id.removeprefix("resp_")
    return [{"id": f"item_{name}_{number}", **_listed(item)} for number, item in enumerate(record.items)]


def _listed(item: Item) -> Item:
    """A text that is said is a list of one part, as OpenAI's API lists it."""
    content = item.get("content")
    if not isinstance(content, str):
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    return {**item, "content": [{"type": kind, "text": content}]}


async def _replay(store: ResponseStore, response_id: str, told: int) -> AsyncIterator[bytes]:
    """The events behind one, those to come too, out of what whoever answers it writes."""
    number = 0
    while True:
        ended = await asyncio.to_thread(store.ended, response_id)
        piece = ended.events if ended is not None else await asyncio.to_thread(store.events, response_id, number)
        for event in piece or ():
            if event.get("sequence_number", 0) > told:
                told = event.get("sequence_number", 0)
                yield as_sse(event)
        if ended is not None:
            return
        if piece is not None:
            number += 1
            continue
        await asyncio.sleep(LOOK_S)
        try:
            await asyncio.to_thread(store.get, response_id)
        except NotFound:
            return


async def _answer_no_store(_: Request, error: Exception) -> JSONResponse:
    reason = f"batches.store: can't be used now: {masked_line(error)}"
    return await answer_error(None, Unavailable(reason, retry_after_s=5))


async def _answer_bad_query(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    message = f"{problem['loc'][-1]}: {shown(problem['input'])} is not allowed: {problem['msg']}"
    return openai_error(InvalidInput.http_status, message, InvalidInput.openai_type)
