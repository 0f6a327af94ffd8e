"""Whatever comes through the gRPC ingress ends in time, with a status that says whose fault it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from hycluster.ingress.proto import inference_pb2 as pb
from tests.integration.conftest import Served
from tests.integration.fuzzing import BOUND_S, MODELS, fuzz, unharmed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SERVICE: Any = pb.DESCRIPTOR.services_by_name["Inference"]
METHODS = {f"/{SERVICE.full_name}/{method.name}": method for method in SERVICE.methods}
OTHERS = ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
# What a caller may be told; INTERNAL and UNKNOWN are the ingress process's own fault.
RIGHT = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
}


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(served.grpc) as channel, unharmed(served):
        yield channel


def status(channel: Any, method: str, request: bytes, metadata: Any = None) -> grpc.StatusCode:
    """How a call of these bytes ends, and what it answers is read to the end."""
    code, said = grpc.StatusCode.OK, ""
    try:
        if "Reflection" in method:
            list(channel.stream_stream(method)(iter([request]), timeout=BOUND_S, metadata=metadata))
        elif METHODS.get(method) is not None and METHODS[method].server_streaming:
            list(channel.unary_stream(method)(request, timeout=BOUND_S, metadata=metadata))
        else:
            channel.unary_unary(method)(request, timeout=BOUND_S, metadata=metadata)
    except grpc.RpcError as error:
        code, said = error.code(), error.details() or ""
    assert code in RIGHT, f"{code}: {said} to {request[:2000]!r}"
    return code


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_random_bytes(channel: Any, method: str) -> None:
    @fuzz
    @given(st.binary(max_size=200))
    def send(request: bytes) -> None:
        status(channel, method, request)

    send()


def messages(kind: type[Message]) -> st.SearchStrategy[Any]:
    """Messages of a kind with any values in any of their fields."""

    @st.composite
    def made(draw: st.DrawFn) -> Any:
        message, known = kind(), list(kind.DESCRIPTOR.fields)
        for field in draw(st.lists(st.sampled_from(known), unique=True)) if known else ():
            fill(draw, message, field)
        return message

    return made()


def fill(draw: st.DrawFn, message: Any, field: Any) -> None:
    low, high = (0, 2**32 - 1) if field.type == field.TYPE_UINT32 else (-(2**31), 2**31 - 1)
    if field.type in (field.TYPE_INT64, field.TYPE_SINT64):
        low, high = -(2**63), 2**63 - 1
    plain: dict[int, st.SearchStrategy[Any]] = {
        field.CPPTYPE_STRING: st.text(),
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_FLOAT: st.floats(width=32),
        field.CPPTYPE_DOUBLE: st.floats(),
    }
    if field.cpp_type == field.CPPTYPE_MESSAGE:
        values = messages(field.message_type._concrete_class)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(values, max_size=3)))
        else:
            getattr(message, field.name).CopyFrom(draw(values))
        return
    values = plain.get(field.cpp_type, st.integers(low, high) | st.integers(0, 5))
    if field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(values, max_size=5)))
    else:
        setattr(message, field.name, draw(values))


@pytest.mark.parametrize("method", METHODS)
def test_random_and_truncated_messages(channel: Any, method: str) -> None:
    kind = METHODS[method].input_type._concrete_class

    @fuzz
    @given(messages(kind), st.sampled_from([*MODELS, None]), st.integers(0, 1000), st.booleans())
    def send(message: Any, model: str | None, length: int, truncate: bool) -> None:
        if model is not None and hasattr(message, "model"):
            message.model = model
        if hasattr(message, "sampling"):
            message.sampling.max_tokens = min(message.sampling.max_tokens, 8)
        whole = message.SerializeToString()
        status(channel, method, whole[:length] if truncate else whole)

    send()


@pytest.mark.parametrize(
    "metadata",
    [
        [("x", "y" * 100_000)],
        [(f"x-{number}", "y" * 50) for number in range(2000)],
        [("x-bin", b"\xff" * 1000)],
        [("grpc-accept-encoding", "zz")],
        [("grpc-previous-rpc-attempts", "x")],
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_odd_metadata(channel: Any, metadata: Any) -> None:
    request = pb.ListModelsRequest().SerializeToString()
    assert status(channel, f"/{SERVICE.full_name}/ListModels", request, metadata) in RIGHT
    assert status(channel, f"/{SERVICE.full_name}/ListModels", request) == grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({"n": 128}, {}),
        ({"logprobs": 2**31 - 1}, {}),
        ({"stop": ["x" * 1000] * 1000}, {}),
        ({"stop_token_ids": [2**31 - 1] * 1000}, {}),
        ({"temperature": float("nan")}, {}),
        ({"top_p": float("nan")}, {}),
        ({"repetition_penalty": float("inf")}, {}),
        ({"presence_penalty": float("nan")}, {}),
        ({"seed": -(2**63)}, {}),
        ({}, {"request_id": "x" * 100_000}),
        ({}, {"session_id": "x" * 100_000}),
        ({}, {"prompt": "word " * 1_000_000}),
        ({}, {"prompt": "\0"}),
        ({}, {"token_ids": pb.TokenIds(ids=[0] * 1_000_000)}),
        ({}, {"priority": 77}),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("model", MODELS)
def test_odd_values(channel: Any, model: str, sampling: dict[str, Any], fields: dict[str, Any]) -> None:
    given_input: dict[str, Any] = {} if {"prompt", "token_ids"} & fields.keys() else {"prompt": "x"}
    request = pb.GenerateRequest(
        model=model, sampling=pb.Sampling(**({"max_tokens": 2} | sampling)), **given_input, **fields
    ).SerializeToString()
    for method in ("Generate", "GenerateStream"):
        status(channel, f"/{SERVICE.full_name}/{method}", request)
