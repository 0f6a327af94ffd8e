from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from hycluster.ingress.message_shape import count_members, message_kind
from hycluster.ingress.proto import inference_pb2 as pb

KIND = pb.GenerateRequest.DESCRIPTOR
WORDS = st.lists(st.text(max_size=3), max_size=4)
PARTS = WORDS.map(lambda texts: [pb.ContentPart(text=text) for text in texts])
TURNS = st.lists(st.builds(pb.ChatMessage, role=st.text(max_size=2), parts=PARTS), max_size=4)
REQUESTS = st.builds(
    pb.GenerateRequest,
    model=st.text(max_size=2),
    messages=st.builds(pb.Messages, messages=TURNS),
    sampling=st.builds(pb.Sampling, stop=WORDS, n=st.none() | st.integers(0, 9), temperature=st.none() | st.floats()),
)


def members(message: Message) -> int:
    found = 0
    for field, value in message.ListFields():
        for each in value if field.is_repeated else [value]:
            found += 1 + (members(each) if isinstance(each, Message) else 0)
    return found


@given(REQUESTS)
def test_fields_and_elements_are_counted(request: pb.GenerateRequest) -> None:
    assert count_members(request.SerializeToString(), KIND, 10_000) == members(request)


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": pb.Messages(messages=[pb.ChatMessage()] * 500)},
        {"messages": pb.Messages(messages=[pb.ChatMessage(parts=[pb.ContentPart()] * 500)])},
        {"messages": pb.Messages(messages=[pb.ChatMessage(tool_calls=[pb.ToolCall(arguments="[{},{},{}]")] * 30)])},
        {"tools": [pb.Tool()] * 500},
        {"tools": [pb.Tool(function=pb.Function(parameters=json.dumps({"a": [{}] * 500})))]},
        {"sampling": pb.Sampling(stop=[""] * 500)},
        {"structured_output": pb.StructuredOutput(choice=pb.Choice(texts=[""] * 500))},
        {"structured_output": pb.StructuredOutput(json_schema=json.dumps([{}] * 500))},
        {"chat_template_kwargs": json.dumps({"a": [[]] * 500})},
    ],
    ids=lambda asked: str(asked).replace("\n", "")[:60],
)
def test_wherever_there_are_many(asked: dict[str, Any]) -> None:
    assert count_members(pb.GenerateRequest(**asked).SerializeToString(), KIND, 100) > 100


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": '{"a": [' * 1000},
        {"token_ids": pb.TokenIds(ids=range(10_000))},
        {"chat_template_kwargs": json.dumps({"code": "{:[" * 1000})},
        {"messages": pb.Messages(messages=[pb.ChatMessage(content="[{}]" * 1000)])},
    ],
    ids=["prompt", "ids", "within JSON", "content"],
)
def test_text_and_numbers_are_few(asked: dict[str, Any]) -> None:
    assert count_members(pb.GenerateRequest(**asked).SerializeToString(), KIND, 100) < 10


def test_numbers_one_by_one_are_many() -> None:
    assert count_members(b"\x22" + b"\xe8\x07" + b"\x08\x01" * 500, KIND, 100) > 100


@given(st.binary(max_size=200))
def test_any_bytes_come_to_an_end(message: bytes) -> None:
    assert count_members(message, KIND, 1000) <= len(message)


@pytest.mark.parametrize(
    "message", [b"\x1a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", b"\x1a\xff\xff\xff\x7f\x0a", b"\x09", b"\x0b\x0c"]
)
def test_what_is_broken(message: bytes) -> None:
    assert count_members(message, KIND, 1000) <= 2


def test_no_method_is_asked_with_anything() -> None:
    assert message_kind("/hycluster.v1.Inference/Nothing") is None
    assert message_kind("/nonsense") is None
    assert message_kind("/hycluster.v1.Inference/Tokenize") is pb.TokenizeRequest.DESCRIPTOR
