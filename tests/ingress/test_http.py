"""The HTTP ingress's own parts: the body's bound, errors in OpenAI's form."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx
import pytest

from hycluster.errors import HyclusterError, Overloaded, UnknownModel
from tests.ingress.echoing import dispatch, echo

if TYPE_CHECKING:
    from starlette.types import ASGIApp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]


def client(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://ingress", headers={"content-type": "application/json"}
    )


class TestBodyLimit:
    LIMIT = 1000

    @pytest.fixture(params=["one app", "several", "vLLM's way of reading"])
    def limited(self, request: pytest.FixtureRequest) -> ASGIApp:
        from fastapi import FastAPI
        from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

        from hycluster.ingress.body import BodyLimit

        if request.param == "one app":
            return BodyLimit(echo("a"), self.LIMIT)
        if request.param == "several":
            return BodyLimit(dispatch(), self.LIMIT)
        api = FastAPI()

        @api.post("/v1/completions")
        async def complete(asked: dict[str, str]) -> dict[str, str]:
            return {"app": "a", "body": json.dumps(asked)}

        api.state.args = Namespace(log_error_stack=False)
        init_exception_handler(api)
        return BodyLimit(api, self.LIMIT)

    def body(self, size: int) -> bytes:
        return json.dumps({"prompt": "x" * (size - 14)}).encode()

    async def in_pieces(self, size: int) -> AsyncIterator[bytes]:
        whole = self.body(size)
        for start in range(0, size, 300):
            yield whole[start : start + 300]

    async def test_up_to_the_bound(self, limited: ASGIApp) -> None:
        body = self.body(self.LIMIT)
        assert len(body) == self.LIMIT
        async with client(limited) as http:
            assert (await http.post("/v1/completions", content=body)).json() == {"app": "a", "body": body.decode()}
            answer = await http.post("/v1/completions", content=self.in_pieces(self.LIMIT))
            assert answer.json() == {"app": "a", "body": body.decode()}

    async def test_a_declared_length_over_it(self, limited: ASGIApp) -> None:
        async with client(limited) as http:
            answer = await http.post("/v1/completions", content=self.body(self.LIMIT + 1))
        self.refused(answer)

    async def test_an_undeclared_length_over_it(self, limited: ASGIApp) -> None:
        async with client(limited) as http:
            answer = await http.post("/v1/completions", content=self.in_pieces(self.LIMIT + 1))
        self.refused(answer)

    async def test_a_bound_of_its_own(self) -> None:
        from hycluster.ingress.body import BodyLimit

        async with client(BodyLimit(echo("a"), 2000)) as http:
            assert (await http.post("/v1/files", content=self.body(2000))).status_code == 200
            answer = await http.post("/v1/files", content=self.body(2001))
        assert answer.status_code == 413
        assert "over the limit of 2000 bytes" in answer.json()["error"]["message"]

    def refused(self, answer: httpx.Response) -> None:
        assert answer.status_code == 413
        error = answer.json()["error"]
        assert error["message"] == f"body: is over the limit of {self.LIMIT} bytes"
        assert error["code"] == 413


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (Overloaded("full", retry_after_s=0.2), 429, "RateLimitError", "1"),
        (Overloaded("full", retry_after_s=2.5), 429, "RateLimitError", "3"),
        (Overloaded("full"), 429, "RateLimitError", None),
        (UnknownModel("x", ["a"]), 404, "NotFoundError", None),
    ],
)
async def test_errors_in_openais_form(error: HyclusterError, status: int, kind: str, retry_after: str | None) -> None:
    from fastapi import FastAPI

    from hycluster.ingress.errors import answer_error

    api = FastAPI()
    api.add_exception_handler(HyclusterError, answer_error)

    @api.get("/")
    async def fail() -> None:
        raise error

    async with client(api) as http:
        answer = await http.get("/")
    assert answer.status_code == status
    code = error.openai_code or status
    assert answer.json() == {"error": {"message": error.message, "type": kind, "param": None, "code": code}}
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers["x-hycluster-error"] == type(error).__name__
