"""The schema of all routes, over one app that has its own and one that stands before it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import httpx
from fastapi import FastAPI, Query

from hycluster.batch_api.routes import batch_api
from hycluster.batch_api.store import Store
from hycluster.ingress.schema import WithSchema
from hycluster.responses.app import WithResponses
from hycluster.responses.store import ResponseStore
from hycluster.settings.ingress import Batches, Http, Responses


async def test_it_has_the_routes_that_stand_before_the_app(tmp_path: Path) -> None:
    app = FastAPI()

    @app.get("/v1/models")
    async def models(limit: Annotated[int, Query(ge=1)] = 1) -> dict[str, int]:
        return {"limit": limit}

    @app.get("/v1/responses/{response_id}", summary="of vLLM's store")
    async def response(response_id: str) -> dict[str, str]:
        return {"id": response_id}

    kept = Batches(store=str(tmp_path))
    layer = WithResponses(app, ResponseStore(Responses(), kept), None, Http())
    assert layer.routes is not None
    whole = WithSchema(WithSchema(layer, layer.routes), batch_api(Store(kept)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(whole), base_url="http://ingress") as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
        assert (await http.get("/v1/models")).json() == {"limit": 1}
    assert set(paths["/v1/responses/{response_id}"]) == {"get", "delete"}
    assert "vLLM" not in str(paths["/v1/responses/{response_id}"])
    assert {"/v1/models", "/v1/responses/{response_id}/input_items", "/v1/files/{file_id}/content"} < set(paths)


async def test_an_app_without_one_says_so() -> None:
    whole = WithSchema(FastAPI(openapi_url=None), FastAPI())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(whole), base_url="http://ingress") as http:
        assert (await http.get("/openapi.json")).status_code == 404
