"""A whole HTTP ingress over a stand-in for a model that does what a client asks of it: says a text in the form that is
wanted, calls a tool, tells what the tool answered. Of the service nothing else is a stand-in; vLLM's app, renderer and
parsers, the gateway, the data plane and the store of responses are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bench import tiny_llama
from hycluster.engine.protocol import Frame
from hycluster.engine.simulated import SimulatedEngine
from hycluster.engine.timing import SimulatedScheduler, _Stream
from hycluster.settings.ingress import Batches, Http, Responses
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.settings import Settings
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedPool

MODEL = "my-model"
CONTEXT_TOKENS = 16_384
ENGINE = Simulated(vocab_size=256, max_model_len=CONTEXT_TOKENS, realtime=False)
# A line of JSON for the tools and one for each message, so that the stand-in can read its prompt.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m | tojson }}\n{% endfor %}assistant:"
)
API = {"chat_template": TEMPLATE, "tool_call_parser": "hermes"}


def answer_to(prompt: str, form: Mapping[str, Any]) -> str:
    """What the stand-in says.

    Args:
        form: what vLLM tells an engine of the form that is wanted; empty if any will do.
    """
    lines = [json.loads(line) for line in prompt.splitlines() if line.startswith(("[", "{"))]
    tools = lines.pop(0) if lines and isinstance(lines[0], list) else []
    if form.get("json") is not None:
        schema = form["json"]
        return json.dumps(example(json.loads(schema) if isinstance(schema, str) else schema))
    if not lines:
        return f"It begins with: {prompt[:40]}"
    said = lines[-1]
    if tools and said["role"] != "tool":
        function = tools[0]["function"]
        call = {"name": function["name"], "arguments": example(function["parameters"])}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return f"Message {len(lines)}, of the {said['role']}: {said['content']}"


def example(schema: dict[str, Any], whole: dict[str, Any] | None = None) -> Any:
    """Something that a JSON schema allows, of the schemas that clients make of their types."""
    whole = whole or schema
    if "$ref" in schema:
        named = functools.reduce(lambda node, name: node[name], schema["$ref"].split("/")[1:], whole)
        return example(named, whole)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return example(schema[several][0], whole)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    match schema.get("type"):
        case "object":
            return {name: example(each, whole) for name, each in schema.get("properties", {}).items()}
        case "array":
            return [example(schema["items"], whole)]
        case kind:
            return {"string": "Paris", "integer": 36, "number": 36.5, "boolean": True}.get(str(kind))


class _Scripted(SimulatedScheduler):
    """Its tokens are those of what is to be said.

    Attributes:
        scripts: by request, the tokens.
    """

    def __init__(self, settings: Simulated) -> None:
        super().__init__(settings)
        self.scripts: dict[str, list[int]] = {}

    def _candidates(self, stream: _Stream) -> Iterator[int]:
        script, end = self.scripts[stream.request_id], stream.params.eos_token_id
        yield script[stream.outputs] if stream.outputs < len(script) else end if end is not None else script[-1]


class _AnsweringEngine(SimulatedEngine):
    tokenizer: Any = None

    def __init__(self, settings: Simulated) -> None:
        super().__init__(settings)
        self._scheduler: _Scripted = _Scripted(settings)

    def add(self, client: int, frames: Sequence[Frame]) -> None:
        request_id, prompt, _, params, *_ = msgspec.msgpack.decode(frames[0])
        text = answer_to(self.tokenizer.decode(prompt), params.get("structured_outputs") or {})
        self._scheduler.scripts[request_id] = self.tokenizer.encode(text, add_special_tokens=False)
        super().add(client, frames)


@contextlib.asynccontextmanager
async def _serving(folder: Path) -> AsyncIterator[str]:
    from transformers import AutoTokenizer

    from hycluster.gateway.generation import Generator
    from hycluster.gateway.opening import open_gateway
    from hycluster.ingress.http import serve_http
    from hycluster.responses.process import ServedResponses

    source = tiny_llama.make(folder / "model", context_tokens=CONTEXT_TOKENS)
    _AnsweringEngine.tokenizer = AutoTokenizer.from_pretrained(source)
    model = Model(name=MODEL, source=str(source), simulated=ENGINE, engine={"max_model_len": CONTEXT_TOKENS}, api=API)
    settings = Settings(models=(model,), http=Http(port=0), batches=Batches(store=str(folder / "store")),
                        responses=Responses())  # fmt: skip
    responses = ServedResponses(settings)
    with SimulatedPool(ENGINE, 1, kind=_AnsweringEngine) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=60
        ) as gateway:
            ingress = await serve_http(
                Generator({MODEL: gateway}), settings.http, before_models=responses.before, drain_timeout_s=1
            )
            try:
                yield f"http://127.0.0.1:{ingress.port}"
            finally:
                await ingress.stop()
                await responses.close(0)


@contextlib.contextmanager
def answering_ingress(folder: Path) -> Iterator[str]:
    """Where it is; it has a thread and an event loop of its own, as an ingress process has.

    Args:
        folder: for the model's files and the stored responses.
    """
    opened: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async with _serving(folder) as url:
            over = asyncio.Event()
            opened.set_result((url, asyncio.get_running_loop(), over))
            await over.wait()

    def run() -> None:
        try:
            uvloop.run(serve())
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    thread = threading.Thread(target=run, name="answering ingress")
    thread.start()
    url, loop, over = opened.result()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
