from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hycluster.core import (
    Generation,
    GenerationRequest,
    ModelCard,
    Output,
    Priority,
    Sampling,
    StructuredOutput,
    TokenLogprob,
    ToolCall,
    Usage,
)
from hycluster.errors import InvalidInput
from hycluster.ingress import translate
from hycluster.ingress.proto import inference_pb2 as pb

maybe = st.none
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
ids = st.integers(0, 2**32 - 1)
samplings = st.builds(
    Sampling,
    max_tokens=maybe() | st.integers(2**20, 2**31 - 1),
    min_tokens=st.integers(0, 2**20),
    temperature=maybe() | st.floats(0, 100),
    top_p=maybe() | st.floats(0, 1, exclude_min=True),
    top_k=maybe() | st.integers(-1, 2**31 - 1),
    min_p=maybe() | st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=maybe() | st.floats(0, 10, exclude_min=True),
    seed=maybe() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(text).map(tuple),
    stop_token_ids=st.lists(ids).map(tuple),
    ignore_eos=st.booleans(),
    n=st.integers(1, 128),
    logprobs=maybe() | st.integers(0, 20),
)
objects = st.dictionaries(text, text | st.integers() | st.booleans(), max_size=3)
parts = st.lists(
    st.builds(lambda said: {"type": "text", "text": said}, text)
    | st.builds(lambda url: {"type": "image_url", "image_url": {"url": url, "detail": "low"}}, text),
    min_size=1,
    max_size=3,
)
calls = st.lists(
    st.builds(
        lambda id_, name, given: {
            "id": id_,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given)},
        },
        text,
        text,
        objects,
    ),
    min_size=1,
    max_size=3,
)
turns = st.fixed_dictionaries(
    {"role": text, "content": st.just("") | text | parts},
    optional={"name": text, "tool_call_id": st.just("") | text, "reasoning": text},
) | st.fixed_dictionaries({"role": text, "content": st.none() | text | parts, "tool_calls": calls})
chats = st.lists(turns, min_size=1, max_size=5)
tools = st.lists(
    st.builds(
        lambda name, rest: {"type": "function", "function": {"name": name, **rest}},
        text,
        st.fixed_dictionaries({}, optional={"description": text, "parameters": objects, "strict": st.booleans()}),
    ),
    min_size=1,
    max_size=3,
)
forms = st.one_of(
    st.builds(lambda schema: StructuredOutput(json_schema=json.dumps(schema)), objects),
    st.just(StructuredOutput(json_object=True)),
    st.builds(lambda given: StructuredOutput(regex=given), text),
    st.builds(lambda given: StructuredOutput(grammar=given), text),
    st.builds(lambda given: StructuredOutput(choice=tuple(given)), st.lists(text, min_size=1, max_size=3)),
)
named = st.builds(lambda name: {"type": "function", "function": {"name": name}}, text)
options = st.fixed_dictionaries(
    {},
    optional={
        "parallel_tool_calls": st.booleans(),
        "include_reasoning": st.booleans(),
        "reasoning_effort": text,
        "chat_template_kwargs": objects,
    },
)
inputs = st.one_of(
    st.fixed_dictionaries({"prompt": text}),
    st.builds(lambda given, rest: given | rest, st.fixed_dictionaries({"messages": chats}), options),
    st.fixed_dictionaries({"messages": chats, "structured_output": forms}),
    st.fixed_dictionaries(
        {"messages": chats, "tools": tools},
        optional={"tool_choice": st.sampled_from(["auto", "none", "required"]) | named},
    ),
    st.fixed_dictionaries({"prompt": text, "structured_output": forms}),
    st.fixed_dictionaries({"token_ids": st.lists(ids, min_size=1)}),
)
requests = st.builds(
    lambda wanted, **rest: GenerationRequest(**wanted, **rest),
    inputs,
    model=text,
    sampling=samplings,
    priority=st.sampled_from(Priority),
    request_id=maybe() | text,
    session_id=maybe() | text,
    job=maybe() | text,
)


def chat_pb(messages: Sequence[pb.ChatMessage] = (), **fields: Any) -> pb.GenerateRequest:
    turns = messages or [pb.ChatMessage(role="user", content="hi")]
    return pb.GenerateRequest(model="m", messages=pb.Messages(messages=turns), **fields)


@given(requests)
def test_a_request_survives_the_wire(request: GenerationRequest) -> None:
    wire = translate.request_to_pb(request).SerializeToString()
    assert translate.request_from_pb(pb.GenerateRequest.FromString(wire)) == request


def test_empty_sampling_is_the_defaults() -> None:
    assert translate.request_from_pb(pb.GenerateRequest(model="m", prompt="p")).sampling == Sampling()


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (pb.GenerateRequest(model="m"), "prompt, messages, token_ids: exactly one must be set"),
        (pb.GenerateRequest(model="m", prompt=""), "prompt: must not be empty"),
        (pb.GenerateRequest(model="m", messages=pb.Messages()), "messages: must not be empty"),
        (pb.GenerateRequest(model="m", token_ids=pb.TokenIds()), "token_ids: must not be empty"),
        (
            pb.GenerateRequest(model="m", messages=pb.Messages(messages=[pb.ChatMessage(content="hi")])),
            r"messages\[0\]\.role: ",
        ),
        (
            pb.GenerateRequest(model="m", prompt="p", priority=pb.Priority.ValueType(7)),
            r"priority: 7 is not allowed.*ONLINE \(0\), BATCH",
        ),
        (pb.GenerateRequest(model="m", prompt="p", sampling=pb.Sampling(max_tokens=0)), "sampling.max_tokens: 0 "),
        (pb.GenerateRequest(model="m", prompt="p", sampling=pb.Sampling(n=0)), "sampling.n: 0 "),
        (pb.GenerateRequest(model="m", prompt="p", sampling=pb.Sampling(top_p=0)), "sampling.top_p: 0.0 "),
        (pb.GenerateRequest(model="m", prompt="p", sampling=pb.Sampling(stop=[""])), "sampling.stop: "),
        (
            chat_pb(messages=[pb.ChatMessage(role="user", content="a", parts=[pb.ContentPart(text="b")])]),
            r"^messages\[0\]\.parts: can't go with content",
        ),
        (
            chat_pb(messages=[pb.ChatMessage(role="user", parts=[pb.ContentPart()])]),
            r"^messages\[0\]\.parts\[0\]: exac",
        ),
        (
            chat_pb(messages=[pb.ChatMessage(role="user", parts=[pb.ContentPart(image_url=pb.ImageUrl())])]),
            r"^messages\[0\]\.parts\[0\]\.image_url\.url: ",
        ),
        (
            chat_pb(messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f")])]),
            r"^messages\[0\]\.tool_calls\[0\]\.id: ",
        ),
        (
            chat_pb(messages=[pb.ChatMessage(role="a", tool_calls=[pb.ToolCall(id="1", name="f", arguments="[1]")])]),
            r"^messages\[0\]\.tool_calls\[0\]\.arguments: '\[1\]' .* must be a JSON object",
        ),
        (chat_pb(tools=[pb.Tool()]), r"^tools\[0\]\.function\.name: "),
        (
            chat_pb(tools=[pb.Tool(function=pb.Function(name="f", parameters="{"))]),
            r"^tools\[0\]\.function\.parameters: '\{' is not allowed; must be a JSON object",
        ),
        (
            chat_pb(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)),
            "^tool_choice: 'required' is not allowed ",
        ),
        (
            chat_pb(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.Mode.ValueType(9))),
            r"^tool_choice\.mode: 9 is not allowed; must be one of MODE_AUTO, MODE_NONE, MODE_REQUIRED",
        ),
        (chat_pb(chat_template_kwargs="3"), "^chat_template_kwargs: '3' "),
        (chat_pb(structured_output=pb.StructuredOutput()), "^structured_output: exactly one of json_schema, "),
        (chat_pb(structured_output=pb.StructuredOutput(json_object=False)), "^structured_output: exactly one of "),
        (chat_pb(structured_output=pb.StructuredOutput(json_schema="[")), r"^structured_output\.json_schema: "),
        (chat_pb(structured_output=pb.StructuredOutput(choice=pb.Choice())), r"^structured_output\.choice: "),
        (
            chat_pb(
                structured_output=pb.StructuredOutput(regex="a"),
                tools=[pb.Tool(function=pb.Function(name="f"))],
                tool_choice=pb.ToolChoice(function="f"),
            ),
            "^structured_output: can't go with tool_choice ",
        ),
        (
            pb.GenerateRequest(model="m", prompt="p", reasoning_effort="low"),
            "^reasoning_effort: goes with messages only",
        ),
        (
            pb.GenerateRequest(model="m", prompt="p", tools=[pb.Tool(function=pb.Function(name="f"))]),
            "^tools: goes with messages only; given is prompt",
        ),
    ],
)
def test_a_wrong_message_is_refused_by_name(message: pb.GenerateRequest, names: str) -> None:
    with pytest.raises(InvalidInput, match=names):
        translate.request_from_pb(message)


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (GenerationRequest(model="m", prompt="\ud800"), "^prompt: "),
        (GenerationRequest(model="m", token_ids=[1, -1]), "^token_ids: "),
        (GenerationRequest(model="m", token_ids=["a"]), "^token_ids: "),  # type: ignore[list-item]
        (GenerationRequest(model="m", messages=[{"role": "user", "content": "x", "tool_cals": []}]), "tool_cals"),
        (GenerationRequest(model="m", messages=[{"role": "user", "content": [{"type": "text"}]}]), r"^messages\[0\]: "),
        (GenerationRequest(model="m", prompt="p", sampling=Sampling(max_tokens=2**31)), r"^sampling\.max_tokens: "),
        (GenerationRequest(model="m", prompt="p", sampling=Sampling(stop_token_ids=(-1,))), "^sampling.stop_token_ids"),
    ],
)
def test_what_a_message_cannot_hold_is_refused_by_name(request_: GenerationRequest, names: str) -> None:
    with pytest.raises(InvalidInput, match=names):
        translate.request_to_pb(request_)


logprobs = [[TokenLogprob(7, "seven", -0.1), TokenLogprob(8, "é", float("-inf"))], [TokenLogprob(9, "", -2.5)]]
first = Output(index=0, text="a b", token_ids=[7, 9], finish_reason="stop", logprobs=logprobs)
second = Output(
    index=1, text="c", token_ids=[8], reasoning="hm", tool_calls=(ToolCall(0, "i", "f", "{"), ToolCall(1, "j", "g", ""))
)
usage = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)


def test_an_answer_survives_the_wire() -> None:
    answer = Generation("r", "m", [first, second], usage)
    assert {field.name for field in fields(usage) if getattr(usage, field.name)} == set(
        pb.Usage.DESCRIPTOR.fields_by_name
    )
    assert translate.response_from_pb(translate.response_to_pb(answer)) == answer


def test_a_delta_becomes_a_chunk_a_sequence_with_usage_in_the_last() -> None:
    chunks = translate.chunks_to_pb(Generation("r", "m", [first, second], usage))
    assert [translate.chunk_from_pb("m", chunk) for chunk in chunks] == [
        Generation("r", "m", [first]),
        Generation("r", "m", [second], usage),
    ]


def test_a_delta_of_nothing_but_usage_is_a_chunk() -> None:
    delta = Generation("r", "m", [], usage)
    assert [translate.chunk_from_pb("m", chunk) for chunk in translate.chunks_to_pb(delta)] == [delta]


def test_models_survive_the_wire() -> None:
    cards = [
        ModelCard(name="a", max_model_len=10, ready_replicas=0),
        ModelCard(name="b", max_model_len=262_144, ready_replicas=3),
    ]
    assert translate.models_from_pb(translate.models_to_pb(cards)) == cards
