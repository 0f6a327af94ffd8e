"""A list is refused by its first wrong element, and taken as before if there is none."""

from __future__ import annotations

from typing import Any, Literal

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, model_validator
from typing_extensions import TypedDict

from hycluster.ingress.first_wrong import stop_at_first

MANY = 1000


class Said(TypedDict):
    role: str
    content: str


class Called(BaseModel):
    kind: Literal["call"]
    name: str
    choices: list[int] = []


class Asked(BaseModel):
    """Made like those of vLLM."""

    model_config = ConfigDict(extra="allow")
    input: str | list[Said | Called]
    stop: str | list[str] | None = None
    pairs: list[tuple[int, int]] = []

    @model_validator(mode="wrap")
    @classmethod
    def watched(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return handler(data)

    @model_validator(mode="before")
    @classmethod
    def repaired(cls, data: Any) -> Any:
        return {**data, "seen": True}


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()

    @app.post("/ask")
    async def ask(asked: Asked, request: Request) -> Any:
        assert all(isinstance(item, (dict, Called)) for item in asked.input)
        return asked.model_dump()

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(len(error.errors()), status_code=400)

    return app


@pytest.fixture
def calls(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress")


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": [1] * MANY},
        {"input": [{"role": "user", "content": "x"}] * 3 + [{"role": 7}] * MANY},
        {"input": [{"kind": "call", "name": "f", "choices": ["x"] * MANY}]},
        {"input": "x", "stop": [1] * MANY},
        {"input": "x", "pairs": [[1, 2]] * 3 + [[1, "x"]] * MANY},
    ],
    ids=["numbers", "objects", "within a model", "union", "tuples"],
)
async def test_one_error_is_enough(app: FastAPI, calls: httpx.AsyncClient, wrong: dict[str, Any]) -> None:
    before = await calls.post("/ask", json=wrong)
    stop_at_first(app.routes)
    after = await calls.post("/ask", json=wrong)
    assert before.status_code == after.status_code == 400
    assert before.json() >= MANY
    assert after.json() < 10


async def test_the_rest_is_as_before(app: FastAPI, calls: httpx.AsyncClient) -> None:
    right: dict[str, Any] = {
        "input": [{"role": "user", "content": "x"}, {"kind": "call", "name": "f", "choices": [1]}] * 3,
        "stop": ["a", "b"],
        "pairs": [[1, 2]],
        "more": [1, "x", None],
    }
    one_wrong = {"input": "x", "stop": 7, "pairs": 7}
    before = [(await calls.post("/ask", json=body)).text for body in (right, one_wrong)]
    schema = app.openapi()
    stop_at_first(app.routes)
    app.openapi_schema = None
    assert [(await calls.post("/ask", json=body)).text for body in (right, one_wrong)] == before
    assert app.openapi() == schema
