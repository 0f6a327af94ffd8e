"""vLLM's errors tell of settings, not of flags that are nowhere to be given."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hycluster.ingress.wording import MOST_BYTES, InOurWords

FLAGS = '"auto" requires --enable-auto-tool-choice and --tool-call-parser; or --reasoning-config'
OURS = (
    '"auto" requires models[].api.enable_auto_tool_choice and models[].api.tool_call_parser;'
    " or models[].engine.reasoning_config"
)


TOO_LONG = "This model's maximum context length is 8 tokens. However, your prompt contains 9 input tokens"


async def answer(request: Request) -> Response:
    match request.url.path:
        case "/overflow":
            return JSONResponse({"error": {"message": TOO_LONG, "param": "input_tokens", "code": 400}}, 400)
        case "/quoted":
            return JSONResponse({"error": {"message": f"prompt: {TOO_LONG!r} is not allowed", "code": 400}}, 400)
        case "/no_json":
            return PlainTextResponse(TOO_LONG, 400)
        case "/refused":
            return JSONResponse({"error": {"message": FLAGS}}, 400)
        case "/said":
            return PlainTextResponse(FLAGS)
        case "/long":
            return PlainTextResponse("--max-model-len " * MOST_BYTES, 400)
        case _:
            return StreamingResponse(iter(["--max-", "model-len"]), 500)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/refused", OURS.replace('"', '\\"')),
        # What a model says is its own.
        ("/said", FLAGS),
        ("/long", "--max-model-len " * MOST_BYTES),
        ("/pieces", "--max-model-len"),
    ],
)
async def test_errors_are_told_in_our_words(path: str, text: str) -> None:
    app = InOurWords(Starlette(routes=[Route("/{any}", answer)]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        answered = await http.get(path)
    assert text in answered.text
    if "content-length" in answered.headers:
        assert int(answered.headers["content-length"]) == len(answered.content)


@pytest.mark.parametrize(("path", "code"), [("/overflow", "context_length_exceeded"), ("/quoted", 400)])
async def test_clients_know_a_prompt_that_is_too_long_by_openais_code(path: str, code: object) -> None:
    app = InOurWords(Starlette(routes=[Route("/{any}", answer)]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as http:
        answered = await http.get(path)
        assert answered.json()["error"]["code"] == code
        assert int(answered.headers["content-length"]) == len(answered.content)
        assert (await http.get("/no_json")).text == TOO_LONG
