"""A chat by way of the gRPC ingress, beside the same one by way of vLLM's HTTP app, over one gateway.

What the model says is scripted (``Script``), and so is no engine asked; client, ingress and socket are real, and
renderer, parsers, tokenizer and app are vLLM's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from hycluster.client import AsyncClient
from hycluster.core import ChatFields, GenerationRequest, Output, Sampling, StructuredOutput, ToolCall
from hycluster.errors import InvalidInput
from hycluster.settings.ingress import Http
from hycluster.settings.load import Admission, Router
from hycluster.settings.model import Model
from hycluster.settings.simulated import Simulated
from tests.ingress.stand_in import open_ingress
from tests.simulated_pool import SimulatedPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]

ENGINE = Simulated(vocab_size=256, max_model_len=2048, realtime=False)
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% if mood %}mood: {{ mood }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}\n"
    "{% endfor %}assistant:"
)
TALKING = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True, "chat_template": TEMPLATE}
REASONING = TALKING | {"reasoning_parser": "deepseek_r1"}
MARKS = ["<think>", "</think>"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
USER = {"role": "user", "content": "How is the weather in Paris?"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
}
ANSWERED = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
ONE_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO_CALLS = ONE_CALL + '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


@dataclass
class Script:
    """In the place of the engine.

    Attributes:
        heard: by request: the prompt, the sampling parameters and what came along.
    """

    text: str = "Hello there."
    finish: str = "stop"
    heard: list[tuple[list[int], Any, dict[str, Any]]] = field(default_factory=list)

    def play(self, tokenizer: Any) -> Any:
        from vllm.outputs import CompletionOutput, RequestOutput
        from vllm.sampling_params import RequestOutputKind

        async def generate(prompt: Any, params: Any, request_id: str, **named: Any) -> AsyncIterator[RequestOutput]:
            ids = list(prompt["prompt_token_ids"])
            self.heard.append((ids, params, named))
            pieces = [tokenizer.encode(self.text, add_special_tokens=False)]
            if params.output_kind is RequestOutputKind.DELTA:
                pieces = cut(pieces[0], set(tokenizer.convert_tokens_to_ids(MARKS)))
            for number, piece in enumerate(pieces):
                last = number + 1 == len(pieces)
                outputs = [
                    CompletionOutput(
                        index=index,
                        text=tokenizer.decode(piece, clean_up_tokenization_spaces=False),
                        token_ids=piece,
                        cumulative_logprob=None,
                        logprobs=None,
                        finish_reason=self.finish if last else None,
                    )
                    for index in range(params.n)
                ]
                yield RequestOutput(request_id, None, ids, None, outputs, finished=last, num_cached_tokens=0)

        return generate


def cut(ids: Iterable[int], alone: set[int]) -> list[list[int]]:
    """In threes, as if a slow caller had let deltas grow; parsers read marks that come alone, as they mostly do."""
    pieces: list[list[int]] = []
    for token in ids:
        if not pieces or len(pieces[-1]) == 3 or alone & {token, pieces[-1][-1]}:
            pieces.append([])
        pieces[-1].append(token)
    return pieces


Ask = Callable[[Script, GenerationRequest], Awaitable[dict[str, Any]]]


@pytest.fixture(scope="module")
def marking_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with tokens for the marks around reasoning."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("marking") / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(MARKS)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def doors(marking_model: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[Ask]]:
    """By the model's ``api``: the gRPC ingress and vLLM's app over one gateway."""

    @contextlib.asynccontextmanager
    async def opened(api: dict[str, Any]) -> AsyncIterator[Ask]:
        from hycluster.gateway.generation import Generator
        from hycluster.gateway.opening import open_gateway
        from hycluster.ingress.http import model_app

        model = Model(name="m", source=str(marking_model), simulated=ENGINE, engine={"max_model_len": 2048}, api=api)
        with SimulatedPool(ENGINE, 1) as simulated:
            async with open_gateway(
                model, simulated.directory(model), router=Router(), admission=Admission(), wait_s=60
            ) as gateway:
                transport = httpx.ASGITransport(await model_app(gateway, Http()))
                async with (
                    open_ingress(Generator({"m": gateway})) as ingress,
                    AsyncClient(f"127.0.0.1:{ingress.port}") as client,
                    httpx.AsyncClient(transport=transport, base_url="http://door") as caller,
                ):

                    async def ask(script: Script, request: GenerationRequest) -> dict[str, Any]:
                        gateway.generate = script.play(gateway.renderer.tokenizer)  # type: ignore[method-assign]
                        asked: Any = {field.name: getattr(request, field.name) for field in fields(request)}
                        told: dict[str, Any] = {
                            "whole": await client.generate(**asked),
                            "deltas": [delta async for delta in client.stream(**asked)],
                            "ids": await client.tokenize("m", **{name: asked[name] for name in OF_A_PROMPT}),
                        }
                        whole = await caller.post(PATH, json=over_http(request))
                        stream = await caller.post(PATH, json=over_http(request) | {"stream": True})
                        events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
                        assert events.pop() == "[DONE]"
                        return told | {"http": whole.json(), "events": list(map(json.loads, events))}

                    yield ask

    return opened


PATH = "/v1/chat/completions"
MAX_TOKENS = 100
OF_A_PROMPT = ("messages", *ChatFields.__annotations__)


def over_http(request: GenerationRequest) -> dict[str, Any]:
    """The same request as OpenAI's API has it."""
    body: dict[str, Any] = {"model": "m", "messages": request.messages, "n": request.sampling.n, "temperature": 0.5}
    # Unset, vLLM reads an older field of that meaning, which warns.
    body["max_completion_tokens"] = MAX_TOKENS
    for name in ("tools", "tool_choice", "chat_template_kwargs", "reasoning_effort"):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    body |= {"parallel_tool_calls": request.parallel_tool_calls, "include_reasoning": request.include_reasoning}
    if (form := request.structured_output) is not None:
        given: dict[str, Any] = {"regex": form.regex, "choice": form.choice and list(form.choice)}
        # As text, in which it travels over gRPC.
        given["json"] = form.json_schema and json.dumps(form.json_schema)
        body["structured_outputs"] = {name: value for name, value in given.items() if value is not None}
    return body


def chat(*messages: dict[str, Any], n: int = 1, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        model="m",
        messages=list(messages or [USER]),
        sampling=Sampling(n=n, temperature=0.5, max_tokens=MAX_TOKENS),
        **fields,
    )


def plain(output: Output) -> tuple[Any, ...]:
    return output.index, output.text, output.reasoning, unnamed(output.tool_calls), output.finish_reason


def unnamed(calls: Any) -> list[tuple[int, bool, str, str]]:
    """Calls without what is made by chance."""
    return [(call.index, bool(call.id), call.name, call.arguments) for call in calls]


def from_http(choice: dict[str, Any], said: dict[str, Any]) -> tuple[Any, ...]:
    calls = [
        ToolCall(
            call.get("index", place),
            call.get("id") or "",
            call["function"].get("name") or "",
            call["function"].get("arguments") or "",
        )
        for place, call in enumerate(said.get("tool_calls") or ())
    ]
    reasoning = said.get("reasoning") or ""
    return choice["index"], said.get("content") or "", reasoning, unnamed(calls), choice["finish_reason"]


CASES: dict[str, tuple[dict[str, Any], GenerationRequest, Script]] = {
    "plain": (TALKING, chat(), Script()),
    "no parsers": ({}, chat(), Script()),
    "parts": (TALKING, chat({"role": "user", "content": [{"type": "text", "text": "Hello"}]}), Script()),
    "auto, a call": (TALKING, chat(tools=[WEATHER]), Script(ONE_CALL)),
    "auto, no call": (TALKING, chat(tools=[WEATHER], tool_choice="auto"), Script()),
    "auto, words and a call": (TALKING, chat(tools=[WEATHER]), Script("Let me see. " + ONE_CALL)),
    "two calls": (TALKING, chat(tools=[WEATHER, TIME]), Script(TWO_CALLS)),
    "two calls of one allowed": (TALKING, chat(tools=[WEATHER, TIME], parallel_tool_calls=False), Script(TWO_CALLS)),
    "two sequences": (TALKING, chat(tools=[WEATHER], n=2), Script(ONE_CALL)),
    "cut short": (TALKING, chat(tools=[WEATHER]), Script(ONE_CALL[:50], "length")),
    "none": (TALKING, chat(tools=[WEATHER], tool_choice="none"), Script("No call.")),
    "required": (
        TALKING,
        chat(tools=[WEATHER], tool_choice="required"),
        Script(ONE_CALL),
    ),
    "named": (TALKING, chat(tools=[WEATHER, TIME], tool_choice=NAMED), Script(ONE_CALL)),
    "forced, cut short": (TALKING, chat(tools=[WEATHER], tool_choice="required"), Script(ONE_CALL[:50], "length")),
    "named, cut short": (TALKING, chat(tools=[WEATHER], tool_choice=NAMED), Script(ONE_CALL[:9], "length")),
    "answered": (TALKING, chat(USER, CALLED, ANSWERED, tools=[WEATHER]), Script("It is sunny.")),
    "a form": (
        TALKING,
        chat(structured_output=StructuredOutput(json_schema={"type": "object"})),
        Script('{"a": 1}'),
    ),
    "a choice": (TALKING, chat(structured_output=StructuredOutput(choice=("yes", "no"))), Script("yes")),
    "template": (TALKING, chat(chat_template_kwargs={"mood": "glad"}), Script()),
    "reasoning": (REASONING, chat(), Script("<think>It is a greeting.</think>Hello.")),
    "reasoning, and a call": (REASONING, chat(tools=[WEATHER]), Script(f"<think>Ask.</think>{ONE_CALL}")),
    "reasoning left out": (REASONING, chat(include_reasoning=False), Script("<think>Secret.</think>Hello.")),
    "reasoning, and a form": (
        REASONING,
        chat(structured_output=StructuredOutput(regex="[a-z]+")),
        Script("<think>Hm.</think>yes"),
    ),
}


@pytest.mark.parametrize("api", [{}, TALKING, REASONING], ids=["no parsers", "tools", "reasoning"])
async def test_both_doors_say_the_same(doors: Any, api: dict[str, Any]) -> None:
    async with doors(api) as ask:
        for name, (wanted, request, script) in CASES.items():
            if wanted is api:
                print(f"case: {name}")
                compare(await ask(script, request), script, request)


def compare(told: dict[str, Any], script: Script, request: GenerationRequest) -> None:
    # The same for the engine ...
    whole, delta, http_whole, http_delta = script.heard
    assert told["ids"] == whole[0]
    for ours, theirs in ((whole, http_whole), (delta, http_delta)):
        assert ours[0] == theirs[0]
        assert repr(ours[1]) == repr(theirs[1])
        for key in ("reasoning_ended", "reasoning_parser_kwargs"):
            assert ours[2].get(key) == theirs[2].get(key), key
    # ... and the same for the caller.
    outputs = told["whole"].outputs
    assert list(map(plain, outputs)) == [from_http(choice, choice["message"]) for choice in told["http"]["choices"]]
    deltas = [plain(output) for delta in told["deltas"] for output in delta.outputs]
    events = [from_http(choice, choice["delta"]) for event in told["events"] for choice in event["choices"]]
    assert list(filter(tells, deltas)) == list(filter(tells, events))
    assert told["deltas"][-1].usage == told["whole"].usage
    ids = [output.token_ids for delta in told["deltas"] for output in delta.outputs]
    assert any(ids) is request.include_reasoning


def tells(said: tuple[Any, ...]) -> bool:
    return any(said[1:])


async def test_a_call_is_taken_out_of_the_text(doors: Any) -> None:
    async with doors(TALKING) as ask:
        told = await ask(Script("Let me see. " + ONE_CALL), chat(tools=[WEATHER]))
    answer = told["whole"]
    (call,) = answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    assert "tool_call" not in answer.text
    assert answer.outputs[0].finish_reason == "tool_calls"
    pieces = [call for delta in told["deltas"] for call in delta.tool_calls]
    assert (pieces[0].name, bool(pieces[0].id)) == ("weather", True)
    assert json.loads("".join(piece.arguments for piece in pieces)) == {"city": "Paris"}
    assert not any("tool_call" in delta.text for delta in told["deltas"])


async def test_reasoning_is_taken_out_of_the_text(doors: Any) -> None:
    script = Script("<think>It is a greeting.</think>Hello.")
    async with doors(REASONING) as ask:
        told = await ask(script, chat())
    assert (told["whole"].reasoning, told["whole"].text) == ("It is a greeting.", "Hello.")
    assert "".join(delta.reasoning for delta in told["deltas"]) == "It is a greeting."
    assert "".join(delta.text for delta in told["deltas"]) == "Hello."


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


REFUSED: list[tuple[GenerationRequest, str]] = [
    (chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}), "^tool_choice: "),
    (chat(tools=[WEATHER], tool_choice="always"), "^tool_choice: "),
    (chat(reasoning_effort="much"), "^reasoning_effort: "),
    (chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), "^messages: .*template"),
    (
        chat({"role": "user", "content": [{"type": "text", "text": "See:"}, PICTURE]}),
        r"^messages\[0\]\.content\[1\]\.image_url: is not allowed; model 'm' takes text only",
    ),
]


async def test_what_can_not_be_is_refused_by_name(doors: Any) -> None:
    script = Script()
    async with doors(TALKING) as ask:
        for request, says in REFUSED:
            with pytest.raises(InvalidInput, match=says):
                await ask(script, request)
    async with doors({}) as ask:
        with pytest.raises(InvalidInput, match=r"^tools: model 'm' has no parser .* api\.tool_call_parser"):
            await ask(script, chat(tools=[WEATHER]))
    assert not script.heard
