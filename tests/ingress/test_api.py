"""The HTTP ingress over a gateway and a simulated engine, asked by the clients that people have."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import openai
import pytest
from openai.types.responses import ResponseFailedEvent

from hycluster.errors import ReplicaLost
from hycluster.settings.ingress import Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.simulated_pool import SimulatedPool
from tests.waiting import until

if TYPE_CHECKING:
    from hycluster.gateway.gateway import Gateway
    from hycluster.gateway.generation import Generator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=512, realtime=False)
ORIGIN = "https://page.example"
CHAT: list[Any] = [{"role": "user", "content": "hi"}]


@contextlib.asynccontextmanager
async def opened(model: Model) -> AsyncIterator[tuple[Gateway, SimulatedPool]]:
    from hycluster.gateway.opening import open_gateway

    with SimulatedPool(ENGINE, 1) as pool:
        async with open_gateway(
            model, pool.directory(model), router=Router(), admission=Admission(), wait_s=60
        ) as gateway:
            yield gateway, pool


@contextlib.asynccontextmanager
async def serving(generator: Generator, **settings: Any) -> AsyncIterator[str]:
    """Where the HTTP ingress is."""
    from hycluster.ingress.http import serve_http

    ingress = await serve_http(generator, Http(port=0, **settings), drain_timeout_s=1)
    try:
        yield f"http://127.0.0.1:{ingress.port}"
    finally:
        await ingress.stop()


@pytest.fixture
def model(tiny_model: Path) -> Model:
    return Model(name="org/tiny", source=str(tiny_model), simulated=ENGINE, engine={"max_model_len": 512})


async def test_what_clients_rely_on(model: Model) -> None:
    from hycluster.gateway.generation import Generator

    async with (
        opened(model) as (gateway, pool),
        serving(Generator({model.name: gateway}), allowed_origins=[ORIGIN], max_body_mib=1) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as anthropics,
        httpx.AsyncClient(base_url=url, headers={"Origin": ORIGIN}) as page,
    ):
        await models_are_found_by_name(client)
        await a_stream_that_was_cut_short_says_so(client)
        await the_page_of_the_schema_needs_no_internet(page)
        await pages_of_other_origins_may_read_all_answers(page)
        await errors_are_in_the_form_of_the_api(anthropics)
        pool[0].die()
        await until(lambda: not gateway.able)
        await an_unknown_model_is_unknown_while_nothing_serves(client, model.name)


async def models_are_found_by_name(client: openai.AsyncOpenAI) -> None:
    (listed,) = (await client.models.list()).data
    found = await client.models.retrieve("org/tiny")
    assert (found.id, found.object, found.owned_by) == ("org/tiny", "model", listed.owned_by)
    assert (found.model_extra or {})["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError, match="'tiny' is not served here"):
        await client.models.retrieve("tiny")


async def a_stream_that_was_cut_short_says_so(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(
        model="org/tiny", input="hi", max_output_tokens=4, stream=True, extra_body={"ignore_eos": True}
    )
    last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


async def the_page_of_the_schema_needs_no_internet(page: httpx.AsyncClient) -> None:
    docs = (await page.get("/docs")).raise_for_status().text
    needed = re.findall(r'(?:<script src|<link [^>]*href)="([^"]+)"', docs)
    local = [address for address in needed if address.startswith("/")]
    assert len(local) == 2
    # But for its icon.
    assert all("favicon" in address for address in needed if address not in local)
    for address in (*local, "/openapi.json"):
        assert len((await page.get(address)).raise_for_status().content) > 10_000


async def pages_of_other_origins_may_read_all_answers(page: httpx.AsyncClient) -> None:
    answers = {
        200: [await page.get("/health"), await page.get("/v1/models")],
        404: [await page.get("/nowhere")],
        413: [await page.post("/v1/completions", content=b" " * (2 << 20))],
    }
    for status, got in answers.items():
        for answer in got:
            assert answer.status_code == status
            assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]


async def errors_are_in_the_form_of_the_api(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="none", max_tokens=4, messages=CHAT)
    with pytest.raises(anthropic.BadRequestError) as wrong:
        await client.messages.create(model="org/tiny", max_tokens=-4, messages=CHAT)
    for caught, kind in ((missing, "not_found_error"), (wrong, "invalid_request_error")):
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", kind)


async def an_unknown_model_is_unknown_while_nothing_serves(client: openai.AsyncOpenAI, known: str) -> None:
    for name, error in (("none", openai.NotFoundError), (known, openai.InternalServerError)):
        with pytest.raises(error):
            await client.completions.create(model=name, prompt="hi")
        with pytest.raises(error):
            await client.chat.completions.create(model=name, messages=CHAT)


# Of each route, a body that is right but for what it is asked with; then what all of them refuse, and what some do.
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
    "/v1/chat/completions": {"messages": CHAT, "max_completion_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": CHAT, "max_tokens": 3},
}
BY_ALL: list[tuple[dict[str, Any], str]] = [
    ({"vllm_xargs": {"kv_transfer_params": "x"}}, "kv_transfer_params: is not allowed"),
    ({"top_k": 2**70}, "can't serialize ints"),
]
BUT_MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"priority": -1}, "priority: -1 is not allowed"),
    ({"logit_bias": {"99999": 1}}, "in logit_bias contain out-of-vocab"),
    ({"stop_token_ids": [99999]}, "in stop_token_ids contain out-of-vocab"),
    ({"structured_outputs": {"json": "{"}}, "Invalid JSON grammar"),
    ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex: is 70000 bytes"),
]
# A response's ``session_id`` is another one.
BY_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"allowed_token_ids": []}, "allowed_token_ids is not None and empty"),
    ({"bad_words": ["\ud800"]}, "bad_words[0]: "),
    ({"bad_words": [" "]}, "bad_words entries must tokenize"),
    ({"thinking_token_budget": 5}, "thinking_token_budget is set"),
    ({"routed_experts_prompt_start": 100}, "routed_experts_prompt_start must be"),
]
BY_ONE: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/completions": [
        ({"prompt": [99999]}, "Token id 99999 is out of vocabulary"),
        ({"prompt": [[5], [99999]]}, "Token id 99999 is out of vocabulary"),
        ({"logprobs": 1000}, "Requested sample logprobs of 1000"),
    ],
    "/v1/chat/completions": [
        ({"logprobs": True, "top_logprobs": 1000}, "Requested sample logprobs of 1000"),
        ({"use_beam_search": True, "n": 500}, "Requested sample logprobs of 1000"),
    ],
    "/v1/responses": [({"request_id": "x" * 1000}, "request_id: ")],
}


async def test_what_is_wrong_is_said_before_a_stream_begins(model: Model) -> None:
    from hycluster.gateway.generation import Generator

    async with (
        opened(model) as (gateway, _),
        serving(Generator({model.name: gateway})) as url,
        httpx.AsyncClient(base_url=url, timeout=60, headers={"content-type": "application/json"}) as client,
    ):
        for path, body in ROUTES.items():
            cases = BY_ALL + (BUT_MESSAGES if path != "/v1/messages" else []) + BY_ONE.get(path, [])
            cases += BY_COMPLETIONS if path.endswith("completions") else []
            for (wrong, why), streamed in itertools.product(cases, (True, False)):
                asked = json.dumps({"model": model.name, "stream": streamed, **body, **wrong})
                answer = await client.post(path, content=asked)
                assert (answer.status_code, why in answer.text) == (400, True), (path, wrong, answer.text)
            # And nothing is left of them.
            await until(lambda: not gateway._gate.held)
            assert not gateway.engine_core.requests_in_flight


async def test_a_streams_headers_wait_for_no_token_and_its_end_says_what_broke_it(model: Model) -> None:
    """Clients wait for headers for a while only; what outputs are to look like is checked before."""
    from hycluster.gateway.generation import Generator

    async with opened(model) as (gateway, pool), serving(Generator({model.name: gateway})) as url:
        pool[0].engine.hang()
        form = {"structured_outputs": {"regex": "[a-z]{3}"}}
        sent: list[Any] = []
        send = gateway.engine_core.add_request_async

        async def seen(request: Any) -> None:
            sent.append(request)
            await send(request)

        gateway.engine_core.add_request_async = seen  # type: ignore[method-assign]
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for path, body in ROUTES.items():
                asked = {"model": model.name, "stream": True, **body, **form}
                async with client.stream("POST", path, json=asked) as answer:
                    assert answer.status_code == 200, path
                    await until(lambda: gateway.engine_core.requests_in_flight)
                    await gateway.end_requests(ReplicaLost("its replica died"))
                    *_, last = (await answer.aread()).decode().replace("data: [DONE]\n\n", "").split("\n\n")[:-1]
                name, data = last.split("data: ")
                said = json.loads(data)
                if path == "/v1/messages":
                    why = {"type": "overloaded_error", "message": "its replica died"}
                    assert (name, said) == ("event: error\n", {"type": "error", "error": why})
                elif path == "/v1/responses":
                    assert (name, said["response"]["status"]) == ("event: response.failed\n", "failed")
                    assert said["response"]["error"] == {"code": "server_error", "message": "its replica died"}
                    assert ResponseFailedEvent.model_validate(said).sequence_number == 2
                else:
                    assert (name, said["error"]["code"]) == ("", 503), path
        # What was checked is what is sent: it says which library takes it.
        formed = [each.sampling_params.structured_outputs for each in sent]
        assert [form and form._backend for form in formed] == ["xgrammar"] * 3 + [None]


async def test_which_routes_act_on_one_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.gateway.generation import Generator
    from hycluster.ingress.http import ModelApp

    # Without it vLLM has no routes for sleep and caches.
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    async with opened(model) as (gateway, _):
        app = ModelApp(gateway, Http(control_routes=True), Generator({model.name: gateway}))
        await app.build()

        def controls(method: str, path: str) -> bool:
            return app.controls({"type": "http", "method": method, "path": path, "headers": []})

        assert controls("POST", "/sleep")
        assert controls("POST", "/reset_prefix_cache")
        assert controls("GET", "/is_sleeping")
        for path in ("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/nowhere"):
            assert not controls("POST", path)
        for path in ("/metrics", "/version", "/docs", "/v1/models/org/tiny", "/sleep"):
            assert not controls("GET", path)
