"""The ingress processes' part, driven by the official client; a stand-in app answers the lines."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from hycluster.batch_api.records import State
from hycluster.batch_api.routes import MULTIPART_BYTES, WithBatches, batch_api, with_batches
from hycluster.batch_api.runner import Runner
from hycluster.batch_api.store import Store
from hycluster.settings.ingress import Batches, Http
from tests.batch_api.stand_in import ENDPOINT, StandIn, jsonl, submit

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def app(store: Store) -> ASGIApp:
    return WithBatches(batch_api(store), JSONResponse({"app": "other"}))


@pytest.fixture
async def http(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as client:
        yield client


@pytest.fixture
async def client(app: ASGIApp) -> AsyncIterator[openai.AsyncOpenAI]:
    module = openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
    # The client brings its own httpx, under a name that depends on its version.
    theirs: Any = __import__(module)
    transport = theirs.ASGITransport(app)
    async with openai.AsyncOpenAI(
        base_url="http://ingress/v1", api_key="none", max_retries=0, http_client=theirs.AsyncClient(transport=transport)
    ) as client:
        yield client


async def uploaded(client: openai.AsyncOpenAI, text: str = "x", **fields: Any) -> openai.types.FileObject:
    return await client.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch", **fields)


async def created(client: openai.AsyncOpenAI, text: str, **fields: Any) -> openai.types.Batch:
    file = await uploaded(client, text)
    given: dict[str, Any] = {"endpoint": ENDPOINT, "completion_window": "24h"} | fields
    return await client.batches.create(input_file_id=file.id, **given)


async def test_a_batch_from_upload_to_download(client: openai.AsyncOpenAI, store: Store, settings: Batches) -> None:
    api = StandIn()
    api.statuses = {"p1": [400]}
    batch = await created(client, jsonl(6), metadata={"team": "a"})
    assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"team": "a"})
    assert batch.expires_at == batch.created_at + 86400
    await Runner(store, settings, api.connect).run(batch.id)
    done = await client.batches.retrieve(batch.id)
    assert (done.status, done.model) == ("completed", "m")
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 6, "completed": 5, "failed": 1}
    assert done.output_file_id
    assert done.error_file_id
    out = (await client.files.content(done.output_file_id)).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in out] == ["c0", "c2", "c3", "c4", "c5"]
    (error,) = (await client.files.content(done.error_file_id)).text.splitlines()
    assert json.loads(error)["response"]["status_code"] == 400
    listed = [file.id async for file in client.files.list(purpose="batch_output", limit=1)]
    assert sorted(listed) == sorted([done.output_file_id, done.error_file_id])


async def test_files(client: openai.AsyncOpenAI) -> None:
    content = jsonl(5000)
    file = await uploaded(client, content, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.bytes, file.filename, file.purpose, file.object) == (len(content), "in.jsonl", "batch", "file")
    assert file.expires_at == file.created_at + 3600
    assert await client.files.retrieve(file.id) == file
    assert (await client.files.content(file.id)).text == content
    deleted = await client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        await client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        await client.files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        await client.files.delete(file.id)


async def test_pages(client: openai.AsyncOpenAI) -> None:
    batches = [(await created(client, "x")).id for _ in range(5)]
    page = await client.batches.list(limit=2)
    assert page.has_more
    assert len(page.data) == 2
    listed = [batch.id async for batch in client.batches.list(limit=2)]
    assert sorted(listed) == sorted(batches)
    assert listed == sorted(listed, reverse=True)
    files = [file.id async for file in client.files.list(limit=2, order="asc")]
    assert len(files) == 5
    assert files == sorted(files)


async def test_cancel(client: openai.AsyncOpenAI, store: Store) -> None:
    batch = await created(client, jsonl(3))
    cancelled = await client.batches.cancel(batch.id)
    assert cancelled.status == "cancelling"
    assert cancelled.cancelling_at
    again = await client.batches.cancel(batch.id)
    assert again.cancelling_at == cancelled.cancelling_at
    store.save_state(batch.id, State(status="completed", ending="completed"))
    with pytest.raises(openai.BadRequestError, match="is completed; it can't be cancelled any more"):
        await client.batches.cancel(batch.id)
    store.save_state(batch.id, State(status="cancelled", ending="cancelled"))
    assert (await client.batches.cancel(batch.id)).status == "cancelled"


async def test_a_file_that_is_being_read_is_not_deleted(client: openai.AsyncOpenAI, store: Store) -> None:
    batch = await created(client, jsonl(3))
    with pytest.raises(openai.BadRequestError, match=f"is being read by '{batch.id}'"):
        await client.files.delete(batch.input_file_id)
    store.save_state(batch.id, State(status="in_progress"))
    assert (await client.files.delete(batch.input_file_id)).deleted


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"completion_window": "soon"}, 400, "body: completion_window: 'soon' is not allowed; must be minutes, hours"),
        ({"endpoint": "/v1/moderations"}, 400, "body: endpoint: '/v1/moderations' is not allowed"),
        ({"input_file_id": "file-x"}, 404, "file_id: there is no file 'file-x'"),
        ({"colour": 1}, 400, "body: colour: unknown key"),
    ],
)
async def test_a_wrong_batch_is_refused(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, fields: dict[str, Any], status: int, says: str
) -> None:
    file = await uploaded(client)
    good = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h"}
    answer = await http.post("/v1/batches", json=good | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert error["message"].startswith(says)
    assert set(error) == {"message", "type", "param", "code"}


async def test_results_are_no_input(client: openai.AsyncOpenAI, store: Store) -> None:
    made = store.register((await uploaded(client)).id, 1, "out", "batch_output")
    with pytest.raises(openai.BadRequestError, match="has purpose 'batch_output'; must be 'batch'"):
        await client.batches.create(input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h")


@pytest.mark.parametrize(
    ("data", "files", "says"),
    [
        ({"purpose": "batch"}, {"other": ("x", b"x")}, "file: must be a file"),
        ({"purpose": "batch", "file": "text"}, {}, "file: must be a file"),
        ({"purpose": "fine-tune"}, {"file": ("x", b"x")}, "purpose: 'fine-tune' is not allowed; must be 'batch'"),
        ({}, {"file": ("x", b"x")}, "purpose: None is not allowed"),
        ({"purpose": "batch"}, {"file": ("x", b"")}, "file: is empty"),
        (
            {"purpose": "batch", "expires_after[seconds]": "1", "expires_after[anchor]": "created_at"},
            {"file": ("x", b"x")},
            "expires_after: seconds: '1' is not allowed",
        ),
    ],
)
async def test_a_wrong_upload_is_refused(http: httpx.AsyncClient, data: Any, files: Any, says: str) -> None:
    answer = await http.post("/v1/files", data=data, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(says)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("POST", "/v1/batches", 400, "body: is not JSON"),
        ("GET", "/v1/batches?limit=101", 400, "limit: '101' is not allowed"),
        ("GET", "/v1/files?order=up", 400, "order: 'up' is not allowed"),
        ("GET", "/v1/batches/batch_1", 404, "batch_id: there is no batch 'batch_1'"),
        ("GET", "/v1/batches/..%2F..%2Fetc", 404, "Not Found"),
        ("GET", "/v1/files/a/b/c", 404, "Not Found"),
        ("PUT", "/v1/files", 405, "Method Not Allowed"),
    ],
)
async def test_errors_are_in_openais_form(
    http: httpx.AsyncClient, method: str, path: str, status: int, says: str
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(says)


async def test_a_body_that_is_no_object_or_too_large(http: httpx.AsyncClient) -> None:
    assert "must be a JSON object, not list" in (await http.post("/v1/batches", json=[])).text
    assert (await http.post("/v1/batches", content=b"[" + b" " * (2 << 20))).status_code == 413


async def test_other_paths_are_for_the_other_app(http: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/v1/filesystem", "/v1/batches2", "/"):
        assert (await http.get(path)).json() == {"app": "other"}


async def test_an_upload_has_a_bound_of_its_own_and_other_paths_have_none_here(settings: Batches) -> None:
    app = with_batches(settings.model_copy(update={"max_file_mib": 1}), Http(), JSONResponse({"app": "other"}))
    body = b" " * ((1 << 20) + MULTIPART_BYTES + 1)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        refused = await http.post("/v1/files", files={"file": body}, data={"purpose": "batch"})
        assert refused.status_code == 413
        assert "is over the limit of" in refused.json()["error"]["message"]
        assert (await http.post("/v1/completions", content=body)).json() == {"app": "other"}


async def test_the_state_is_read_anew_by_every_ingress_process(settings: Batches) -> None:
    one, other = Store(settings), Store(settings)
    batch = submit(one, "x")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(batch_api(other)), base_url="http://ingress") as http:
        assert (await http.get(f"/v1/batches/{batch.id}")).json()["status"] == "validating"
        one.save_state(batch.id, State(status="in_progress", total=3))
        assert (await http.get(f"/v1/batches/{batch.id}")).json()["request_counts"]["total"] == 3
