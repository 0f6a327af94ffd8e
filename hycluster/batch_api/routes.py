"""``/v1/files`` and ``/v1/batches`` at the HTTP ingress. Errors are in OpenAI's form.

The ingress process only reads and writes the store; the executor does the rest. Where callers are asked who they are,
each sees what is his project's.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.auth.caller import caller_now
from hycluster.batch_api.records import FINAL, Batch, ExpiresAfter, NewBatch, StoredFile, batch_object, new_record_id
from hycluster.batch_api.store import Store
from hycluster.errors import InvalidInput, NotFound
from hycluster.errors import shown as echoed
from hycluster.ingress.body import BodyLimit
from hycluster.ingress.json_api import json_api, json_body, list_page
from hycluster.ingress.schema import WithSchema
from hycluster.settings.ingress import Batches, Http
from hycluster.settings.read import validate

ROOTS = ("/v1/files", "/v1/batches")
MULTIPART_BYTES = 64 << 10
MAX_LISTED_FILES = 10_000
MAX_LISTED_BATCHES = 100

After = Annotated[str | None, Query()]


class WithBatches:
    """ASGI app: the Batch API's routes go to one app, all others to another."""

    def __init__(self, batches: ASGIApp, others: ASGIApp) -> None:
        self._batches = batches
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        ours = scope["type"] == "http" and any(path == root or path.startswith(f"{root}/") for root in ROOTS)
        await (self._batches if ours else self._others)(scope, receive, send)


def with_batches(batches: Batches, http: Http, others: ASGIApp) -> ASGIApp:
    """The Batch API of these settings beside an HTTP ingress's other routes."""
    api = batch_api(Store(batches))
    # Multipart's own headers come on top of the file.
    limit = (batches.max_file_mib << 20) + MULTIPART_BYTES
    return WithBatches(BodyLimit(api, limit, stall_s=http.stalled_client_timeout_s), WithSchema(others, api))


def batch_api(store: Store) -> FastAPI:
    """The app of the Batch API."""
    app = json_api()
    app.include_router(_files(store))
    app.include_router(_batches(store))
    return app


def _files(store: Store) -> APIRouter:
    routes = APIRouter(prefix="/v1/files")

    @routes.post("")
    async def upload(request: Request) -> Any:
        # Large parts lie in a temporary file, not in memory.
        async with request.form(max_files=1, max_fields=8) as form:
            file, expires_after = _upload(form)
            stored = await asyncio.to_thread(
                store.add_file, file.file, file.filename or "", expires_after.seconds if expires_after else None
            )
        return stored.shown()

    @routes.get("")
    async def list_files(
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED_FILES)] = MAX_LISTED_FILES,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Any:
        newest_first = order == "desc"
        found: list[StoredFile] = await asyncio.to_thread(
            store.list_files, after, limit + 1, purpose=purpose, newest_first=newest_first
        )
        return list_page([file.shown() for file in found], limit)

    @routes.get("/{file_id}")
    async def retrieve(file_id: str) -> Any:
        return (await asyncio.to_thread(store.file, file_id)).shown()

    @routes.get("/{file_id}/content")
    async def content(file_id: str) -> Response:
        file = await asyncio.to_thread(store.file, file_id)
        opened = await asyncio.to_thread(store.open_content, file_id)
        headers = {"Content-Length": str(file.bytes)}
        return StreamingResponse(store.chunks(opened), media_type="application/octet-stream", headers=headers)

    @routes.delete("/{file_id}")
    async def delete(file_id: str) -> Any:
        await asyncio.to_thread(_delete, store, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def _batches(store: Store) -> APIRouter:
    routes = APIRouter(prefix="/v1/batches")

    @routes.post("")
    async def create(request: Request) -> Any:
        asked = validate(NewBatch, await json_body(request), "body")
        return await asyncio.to_thread(_create, store, asked)

    @routes.get("")
    async def list_batches(after: After = None, limit: Annotated[int, Query(ge=1, le=MAX_LISTED_BATCHES)] = 20) -> Any:
        def look() -> list[dict[str, Any]]:
            return [_seen(store, batch) for batch in store.list_batches(after, limit + 1)]

        return list_page(await asyncio.to_thread(look), limit)

    @routes.get("/{batch_id}")
    async def retrieve(batch_id: str) -> Any:
        return await asyncio.to_thread(lambda: _seen(store, store.batch(batch_id)))

    @routes.post("/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Any:
        return await asyncio.to_thread(_cancel, store, batch_id)

    return routes


def _upload(form: FormData) -> tuple[UploadFile, ExpiresAfter | None]:
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise InvalidInput("file: must be a file in a multipart/form-data body")
    if purpose != "batch":
        raise InvalidInput(f"purpose: {echoed(purpose)} is not allowed; must be 'batch'")
    given = {
        name: form[f"expires_after[{name}]"] for name in ExpiresAfter.model_fields if f"expires_after[{name}]" in form
    }
    return file, validate(ExpiresAfter, given, "expires_after") if given else None


def _delete(store: Store, file_id: str) -> None:
    store.file(file_id)
    # Until it is checked; after that the batch has what it needs.
    for batch_id in store.open_batches():
        try:
            batch = store.batch(batch_id)
        except NotFound:
            # Another project's, which has not this file; or not written yet.
            continue
        if batch.input_file_id == file_id and store.state(batch_id).status == "validating":
            raise InvalidInput(f"file_id: {file_id!r} is being read by {batch_id!r}; wait or cancel that batch")
    store.delete_file(file_id)


def _create(store: Store, asked: NewBatch) -> dict[str, Any]:
    file = store.file(asked.input_file_id)
    if file.purpose != "batch":
        raise InvalidInput(f"input_file_id: file {file.id!r} has purpose {file.purpose!r}; must be 'batch'")
    now = int(time.time())
    batch = Batch(
        id=new_record_id("batch_"),
        endpoint=asked.endpoint,
        input_file_id=file.id,
        completion_window=asked.completion_window,
        created_at=now,
        expires_at=now + asked.window_s,
        metadata=asked.metadata,
        output_expires_after_s=asked.output_expires_after.seconds if asked.output_expires_after else None,
        caller=caller_now(),
    )
    store.add_batch(batch)
    return _seen(store, batch)


def _cancel(store: Store, batch_id: str) -> dict[str, Any]:
    batch, state = store.batch(batch_id), store.state(batch_id)
    if state.status in FINAL - {"cancelled"}:
        raise InvalidInput(f"batch_id: {batch_id!r} is {state.status}; it can't be cancelled any more")
    if state.status not in FINAL:
        store.cancel(batch_id)
    return _seen(store, batch)


def _seen(store: Store, batch: Batch) -> dict[str, Any]:
    return batch_object(batch, store.state(batch.id), store.cancelling_at(batch.id))
