"""Files and batches belong to the project whose key they were made with, and its batches are run as by that key."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.auth.caller import Caller, calling, current_caller
from hycluster.batch_api.batch_states import batch_states
from hycluster.batch_api.lines import BatchEngines
from hycluster.batch_api.routes import WithBatches, batch_api
from hycluster.batch_api.runner import Runner
from hycluster.batch_api.store import Store
from hycluster.errors import NotFound
from hycluster.ingress.dispatch import ModelDispatch
from hycluster.ingress.forms import in_form
from hycluster.ingress.guarded import Guarded
from hycluster.settings.ingress import Batches
from tests.auth.keyed import keyed
from tests.batch_api.stand_in import ENDPOINT, StandIn, jsonl, lines_of, submit

pytestmark = pytest.mark.timeout(120)

ALICE = Caller("acme", "search", "laptop", frozenset({"m"}), frozenset({"batch"}))
COLLEAGUE = Caller("acme", "search", "other")
BOB = Caller("acme", "other", "laptop")


async def test_another_projects_is_not_there(store: Store, tmp_path: Path) -> None:
    with keyed(tmp_path) as keys:
        app = in_form(Guarded(WithBatches(batch_api(store), JSONResponse({})), keys.guard), [])
        transport = httpx.ASGITransport(app)

        def by(key: str) -> httpx.AsyncClient:
            return httpx.AsyncClient(
                transport=transport, base_url="http://ingress", headers={"authorization": f"Bearer {key}"}
            )

        mine, others, also_mine = by(keys.key("batch")), by(keys.key("batch", other=True)), by(keys.key("batch"))
        upload: Any = {"files": {"file": ("in.jsonl", io.BytesIO(jsonl(2).encode()))}, "data": {"purpose": "batch"}}
        file = (await mine.post("/v1/files", **upload)).json()
        assert "caller" not in file
        asked = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
        batch = (await mine.post("/v1/batches", json=asked)).json()
        for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", f"/v1/batches/{batch['id']}"):
            assert (await also_mine.get(path)).status_code == 200
            assert (await others.get(path)).status_code == 404
        for path in ("/v1/files", "/v1/batches"):
            assert len((await also_mine.get(path)).json()["data"]) == 1
            assert (await others.get(path)).json()["data"] == []
        assert (await others.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 404
        assert (await others.delete(f"/v1/files/{file['id']}")).status_code == 404
        assert (await others.post("/v1/batches", json=asked)).status_code == 404
        assert store.cancelling_at(batch["id"]) is None
        # While that of another is read.
        upload["files"] = {"file": ("in.jsonl", io.BytesIO(b"x"))}
        theirs = (await others.post("/v1/files", **upload)).json()
        assert (await others.delete(f"/v1/files/{theirs['id']}")).json()["deleted"]


async def test_lines_are_asked_as_by_the_key(store: Store, settings: Batches) -> None:
    seen: list[Caller | None] = []
    stand_in = StandIn()

    async def model(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(current_caller.get())
        await stand_in.app(scope, receive, send)

    app: ASGIApp = ModelDispatch({"m": model, "n": model}, {"m": "m", "n": "n"}.get, lambda: ["m", "n"])

    async def connect() -> BatchEngines:
        return BatchEngines(app, lambda model, batch: stand_in.lanes.lane(batch))

    with calling(ALICE):
        who = ALICE.as_json()
        allowed, refused = submit(store, jsonl(2), caller=who), submit(store, jsonl(2, model="n"), caller=who)
    for batch in (allowed, refused):
        await Runner(store, settings, connect).run(batch.id)
    assert seen == [ALICE, ALICE]
    (error, _) = lines_of(store, store.state(refused.id).error_file_id)
    assert (error["response"]["status_code"], error["response"]["body"]["error"]["code"]) == (404, "model_not_found")
    output = store.state(allowed.id).output_file_id or ""
    with calling(COLLEAGUE):
        assert len(lines_of(store, output)) == 2
    with calling(BOB), pytest.raises(NotFound):
        store.file(output)
    assert len(batch_states(store)) == 2


def test_what_was_made_before_there_were_keys_is_nobodys(store: Store) -> None:
    batch = submit(store, jsonl(1))
    with calling(ALICE):
        assert store.list_batches(None, 10) == []
        with pytest.raises(NotFound):
            store.file(batch.input_file_id)
    assert store.list_batches(None, 10) == [batch]
