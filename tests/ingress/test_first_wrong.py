"""A list is refused by its first wrong element, and taken as before if there is none."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidatorFunctionWrapHandler,
    create_model,
    model_validator,
)
from typing_extensions import TypedDict

from hycluster.errors import TooManyMembers
from hycluster.ingress.first_wrong import quick_to_validate

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
    quick_to_validate(app.routes)
    after = await calls.post("/ask", json=wrong)
    assert before.status_code == after.status_code == 400
    assert before.json() >= MANY
    assert after.json() < 10


tried: list[str] = []


def kind(name: str, *, named: bool) -> Any:
    """One of many that an item may be; says that it was tried."""

    def note(value: Any) -> Any:
        tried.append(name)
        return value

    said: Any = (Literal[name], ...) if named else (Literal[name] | None, None)
    fields: dict[str, Any] = {"text": (str, ...), "type": said}
    return Annotated[create_model(name, **fields), BeforeValidator(note)]


# As openai's are: kinds, and a union of kinds among them.
NAMED: Any = Union[tuple(kind(f"k{number}", named=True) for number in range(9))]  # noqa: UP007
ANY_KIND: Any = Union[kind("plain", named=False), Annotated[NAMED, "apart"]]  # noqa: UP007


@pytest.mark.parametrize(
    ("item", "tries"),
    [
        ({"type": "k7", "text": "x"}, ["k7"]),
        ({"type": "plain", "text": "x"}, ["plain"]),
        ({"text": "x"}, ["plain"]),
        ({"type": None, "text": "x"}, ["plain"]),
        ({"type": "k7", "text": 7}, ["k7"]),
        ({"type": "plain", "text": 7}, ["plain"]),
        ({"type": "nix", "text": "x"}, []),
    ],
    ids=str,
)
async def test_an_item_is_tried_as_what_it_says_that_it_is(item: dict[str, Any], tries: list[str]) -> None:
    app = FastAPI()

    @app.post("/ask")
    async def ask(items: list[ANY_KIND]) -> Any:
        return items

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as calls:
        before = await calls.post("/ask", json=[item])
        assert len(set(tried)) == 10
        quick_to_validate(app.routes)
        tried.clear()
        after = await calls.post("/ask", json=[item])
    assert set(tried) == set(tries)
    tried.clear()
    assert after.status_code == before.status_code
    if after.status_code == 200:
        assert after.json() == before.json()
    else:
        assert len(after.json()["detail"]) < len(before.json()["detail"])
        assert item["type"] != "nix" or "'nix' found using type() does not match any of" in after.text


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
    quick_to_validate(app.routes)
    app.openapi_schema = None
    assert [(await calls.post("/ask", json=body)).text for body in (right, one_wrong)] == before
    assert app.openapi() == schema


@pytest.mark.parametrize(
    ("many", "few"),
    [
        ({"messages": [{"tool_calls": [{"function": {"arguments": "[{}, {}]"}}] * 5}] * 8}, 5),
        ({"input": [{"type": "function_call", "arguments": '{"a": [{}, {}]}'}] * 40}, 20),
        ({"input": [{"arguments": "[" * 101}]}, 101),
    ],
    ids=["chat", "responses", "one"],
)
async def test_what_is_in_arguments_has_a_bound(many: dict[str, Any], few: int) -> None:
    app = FastAPI()

    @app.post("/ask")
    async def ask(body: dict[str, Any]) -> Any:
        return body

    quick_to_validate(app.routes, 100)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as calls:
        with pytest.raises(TooManyMembers, match="arguments: has more than 100 members"):
            await calls.post("/ask", json=many)
        least = {name: listed[: len(listed) // few] for name, listed in many.items()}
        assert (await calls.post("/ask", json=least)).status_code == 200
