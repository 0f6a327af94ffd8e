"""The shipped client, sync and async, against a real gRPC ingress with a stand-in for the pool behind it."""

from __future__ import annotations

import asyncio
import json
import pickle
import typing
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from hycluster import errors
from hycluster.client import AUTHORITIES_VARIABLE, SERVICE, AsyncClient, Client, SamplingFields, https_context
from hycluster.core import (
    Generation,
    GenerationRequest,
    Output,
    Priority,
    Sampling,
    StructuredOutput,
    TokenLogprob,
    ToolCall,
    Usage,
)
from hycluster.ingress.grpc import GrpcIngress
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from tests.ingress.stand_in import CARD, MODEL, StandInGenerator, join, open_ingress

ANSWER = Generation(
    request_id="r",
    model=MODEL,
    outputs=[Output(index, "w0 w1 ", [100 * index, 100 * index + 1], "length", None) for index in range(2)],
    usage=Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1),
)


class Both:
    """One face for the two clients, so that every test runs on each; the sync one in a thread of its own."""

    def __init__(self, kind: str, target: str, **options: Any) -> None:
        self.sync = kind == "sync"
        self.client: Any = Client(target, **options) if self.sync else AsyncClient(target, **options)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.sync:
            return await asyncio.to_thread(getattr(self.client, method), *args, **kwargs)
        return await getattr(self.client, method)(*args, **kwargs)

    async def stream(self, *args: Any, most: int | None = None, **kwargs: Any) -> list[Generation]:
        """The first ``most`` deltas, after which the stream is left."""
        if self.sync:
            return await asyncio.to_thread(self._stream, args, most, kwargs)
        deltas = []
        async with aclosing(self.client.stream(*args, **kwargs)) as stream:
            async for delta in stream:
                deltas.append(delta)
                if len(deltas) == most:
                    break
        return deltas

    def _stream(self, args: Any, most: int | None, kwargs: Any) -> list[Generation]:
        deltas = []
        stream = self.client.stream(*args, **kwargs)
        for delta in stream:
            deltas.append(delta)
            if len(deltas) == most:
                stream.close()
        return deltas

    async def close(self) -> None:
        await self.call("close")


@pytest.fixture
def stand_in() -> StandInGenerator:
    return StandInGenerator()


@pytest_asyncio.fixture
async def ingress(stand_in: StandInGenerator) -> AsyncIterator[GrpcIngress]:
    async with open_ingress(stand_in) as ingress:
        yield ingress


@pytest_asyncio.fixture(params=["sync", "async"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Both]]:
    made: list[Both] = []

    def connect(target: str, **options: Any) -> Both:
        made.append(Both(request.param, target, **options))
        return made[-1]

    yield connect
    for client in made:
        await client.close()


@pytest.fixture
def client(ingress: GrpcIngress, connect: Callable[..., Both]) -> Both:
    return connect(f"127.0.0.1:{ingress.port}")


async def test_generate(client: Both) -> None:
    assert await client.call("generate", MODEL, prompt="a b c", max_tokens=2, n=2, request_id="r") == ANSWER


async def test_stream(client: Both) -> None:
    deltas = await client.stream(MODEL, prompt="a b c", max_tokens=2, n=2, request_id="r")
    assert [len(delta.outputs) for delta in deltas] == [1, 1, 1, 1]
    assert [delta.usage is None for delta in deltas] == [True, True, True, False]
    assert join(deltas) == ANSWER


async def test_logprobs(client: Both) -> None:
    answer = await client.call("generate", MODEL, prompt="a", max_tokens=1, logprobs=2)
    assert answer.outputs[0].logprobs == [[TokenLogprob(0, "w0", -0.1), TokenLogprob(1, "w1", -0.2)]]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True}}
CHAT: dict[str, Any] = {
    "tools": [WEATHER],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"mood": "glad"},
}


@pytest.mark.parametrize(
    "wanted",
    [
        {"prompt": "a b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "", "tool_call_id": "c"}]},
        {"token_ids": [3, 0, 5]},
        {"prompt": "a b", "structured_output": StructuredOutput(choice=("yes", "no"))},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning": "hm",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "sunny", "tool_call_id": "c"},
            ],
            **CHAT,
            "parallel_tool_calls": False,
            "include_reasoning": False,
        },
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_what_is_asked_arrives(
    client: Both, stand_in: StandInGenerator, method: str, wanted: dict[str, Any]
) -> None:
    rest: dict[str, Any] = {"priority": Priority.BATCH, "request_id": "r", "session_id": "s"}
    sampling: dict[str, Any] = {"max_tokens": 2, "temperature": 0.0, "stop": ("x",)}
    send = client.stream if method == "stream" else lambda *args, **ask: client.call(method, *args, **ask)
    await send(MODEL, **wanted, **rest, **sampling)
    await send(MODEL, **wanted, **rest, sampling=Sampling(**sampling))
    expected = GenerationRequest(model=MODEL, **wanted, **rest, sampling=Sampling(**sampling))
    assert stand_in.requests == [(expected, None), (expected, None)]


async def test_a_lone_stop_string_is_one_string(client: Both, stand_in: StandInGenerator) -> None:
    await client.call("generate", MODEL, prompt="a", stop="END")
    assert stand_in.requests[0][0].sampling.stop == ("END",)


SAYS = [
    Output(0, "", [1], reasoning="It is "),
    Output(0, "", [2], reasoning="a city."),
    Output(0, "Let me see.", [3, 4]),
    Output(0, "", [5], tool_calls=(ToolCall(0, "c1", "weather", ""),)),
    Output(0, "", [6], tool_calls=(ToolCall(0, "", "", '{"city": '), ToolCall(1, "c2", "time", "{}"))),
    Output(0, "", [7], "tool_calls", tool_calls=(ToolCall(0, "", "", '"Paris"}'),)),
]


async def test_reasoning_and_tool_calls_come_apart_from_the_text(client: Both, stand_in: StandInGenerator) -> None:
    stand_in.says = SAYS
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "tools": [WEATHER]}
    deltas = await client.stream(MODEL, **ask)
    assert [delta.outputs for delta in deltas] == [[output] for output in SAYS]
    for answer in (await client.call("generate", MODEL, **ask), join(deltas)):
        assert (answer.text, answer.reasoning) == ("Let me see.", "It is a city.")
        weather, time = answer.tool_calls
        assert (weather.id, weather.name, json.loads(weather.arguments)) == ("c1", "weather", {"city": "Paris"})
        assert time == ToolCall(1, "c2", "time", "{}")
        assert answer.outputs[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, "prompt, messages, token_ids"),
        ({"prompt": "a", "token_ids": [1]}, "set are prompt, token_ids"),
        ({"prompt": "a", "max_tokens": 0}, "sampling.max_tokens: 0"),
        ({"prompt": "a", "sampling": Sampling(), "seed": 3}, "sampling: .*seed"),
        ({"token_ids": [-1]}, r"token_ids\[0\]: -1 "),
        ({"prompt": "a", "tool_choic": "auto"}, "^tool_choic: unknown argument; did you mean 'tool_choice'"),
        ({"prompt": "a", "tools": [WEATHER]}, "^tools: goes with messages only; given is prompt"),
        ({"prompt": "a", "tools": "weather"}, "^tools: 'weather' is not allowed; must be a list of tools"),
        ({"prompt": "a", "structured_output": {"regex": "a"}}, "^structured_output: .*StructuredOutput"),
        ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "auto"}, "^tool_choice: .* without tools"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": {1}}}, "^chat_template_kwargs"),
    ],
)
async def test_wrong_arguments_are_refused_before_any_call(
    connect: Callable[..., Both], wanted: dict[str, Any], names: str
) -> None:
    nowhere = connect("127.0.0.1:1")
    with pytest.raises(errors.InvalidInput, match=names):
        await nowhere.call("generate", MODEL, **wanted)
    with pytest.raises(errors.InvalidInput, match=names):
        nowhere.client.stream(MODEL, **wanted)


async def test_tokenize(client: Both, stand_in: StandInGenerator) -> None:
    assert await client.call("tokenize", MODEL, prompt="a bb") == [1, 2]
    assert await client.call("tokenize", MODEL, messages=[{"role": "user", "content": "ccc"}]) == [3]
    assert await client.call("tokenize", MODEL, messages=[{"role": "user", "content": "ccc"}], **CHAT) == [3]
    nothing = dict.fromkeys(CHAT)
    assert stand_in.chats == [nothing, nothing, CHAT]
    with pytest.raises(errors.InvalidInput, match=r"^tool_choise: unknown argument; did you mean 'tool_choice'"):
        await client.call("tokenize", MODEL, prompt="a", tool_choise="auto")
    with pytest.raises(errors.InvalidInput, match=r"^tools: goes with messages only"):
        await client.call("tokenize", MODEL, prompt="a", tools=[WEATHER])
    with pytest.raises(errors.InvalidInput, match="prompt, messages"):
        await client.call("tokenize", MODEL)
    with pytest.raises(errors.UnknownModel, match="'other' is not served here"):
        await client.call("tokenize", "other", prompt="a")


async def test_count_tokens(client: Both, stand_in: StandInGenerator) -> None:
    assert await client.call("count_tokens", MODEL, ["a bb", "", "ccc"]) == [2, 0, 1]
    assert await client.call("count_tokens", MODEL, []) == []
    with pytest.raises(errors.UnknownModel, match="'other' is not served here"):
        await client.call("count_tokens", "other", ["a"])
    for wrong in ("one string", [1]):
        with pytest.raises(errors.InvalidInput, match=r"^texts(\[0\])?: "):
            await client.call("count_tokens", MODEL, wrong)
    stand_in.error, stand_in.failures_left = errors.Unavailable("no replica"), 1
    with pytest.raises(errors.Unavailable):
        await client.call("count_tokens", MODEL, ["a"])


async def test_list_models(client: Both) -> None:
    assert await client.call("list_models") == [CARD]


async def test_ready(client: Both, stand_in: StandInGenerator, connect: Callable[..., Both]) -> None:
    assert await client.call("ready") is True
    stand_in.is_ready = False
    await asyncio.sleep(0.2)  # the ingress process looks every 20 ms
    assert await client.call("ready") is False
    assert await connect("127.0.0.1:1").call("ready") is False


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidInput("prompt: too long"),
        errors.PromptTooLong("prompt: has 9 tokens"),
        errors.NotFound("no such adapter"),
        errors.ReplicaLost("the replica was lost", retry_after_s=0.1),
        errors.KillsReplicas("two replicas died of it"),
        errors.Unauthenticated("authorization: wrong token"),
        errors.UnknownModel("x", ["y"]),
        errors.Overloaded("too many requests", retry_after_s=2.5),
        errors.Unavailable("no replica"),
        errors.DeadlineExceeded("too late"),
        errors.HyclusterError("engine broke"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_come_back_as_they_were_raised(
    client: Both, stand_in: StandInGenerator, error: errors.HyclusterError
) -> None:
    stand_in.error, stand_in.error_after = error, 1
    for call in (
        client.call("generate", MODEL, prompt="a"),
        client.stream(MODEL, prompt="a"),
        client.call("list_models"),
    ):
        with pytest.raises(errors.HyclusterError) as caught:
            await call
        came = caught.value
        assert (type(came), came.message, came.retry_after_s) == (type(error), error.message, error.retry_after_s)
        assert came.reason == error.reason
        assert came.metadata.items() >= error.metadata.items()
        passed_on = pickle.loads(pickle.dumps(came))
        assert (type(passed_on), vars(passed_on)) == (type(came), vars(came))


class OtherServer(inference_pb2_grpc.InferenceServicer):
    """Fails as another version of the server does, or one with a proxy before it."""

    def __init__(self, code: grpc.StatusCode, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self.code, self.metadata = code, metadata

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        await context.abort(self.code, "says no", self.metadata)
        raise AssertionError("abort always raises")


def details(code: grpc.StatusCode, info: ErrorInfo, message: str = "says no") -> tuple[str, bytes]:
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(info)
    return "grpc-status-details-bin", status.SerializeToString()


EXHAUSTED, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
OURS = ErrorInfo(reason="REPLICA_LOST", domain="hycluster")


@pytest.mark.parametrize(
    ("code", "metadata", "kind", "reason", "retry_after_s"),
    [
        pytest.param(EXHAUSTED, (("retry-after-s", "2.5"),), errors.Overloaded, "OVERLOADED", 2.5, id="no details"),
        pytest.param(
            UNAVAILABLE, (details(UNAVAILABLE, ErrorInfo(reason="ON_FIRE", domain="hycluster")),),
            errors.Unavailable, "ON_FIRE", None, id="a reason that is not known yet",
        ),
        pytest.param(
            EXHAUSTED, (details(EXHAUSTED, OURS),),
            errors.Overloaded, "REPLICA_LOST", None, id="a reason of another code",
        ),
        pytest.param(
            UNAVAILABLE, (details(UNAVAILABLE, ErrorInfo(reason="REPLICA_LOST", domain="a.proxy")),),
            errors.Unavailable, "UNAVAILABLE", None, id="another's domain",
        ),
        pytest.param(
            UNAVAILABLE, (details(UNAVAILABLE, OURS, "said yes"), ("retry-after-s", "1")),
            errors.Unavailable, "UNAVAILABLE", 1.0, id="a message that was changed on the way",
        ),
        pytest.param(
            UNAVAILABLE, (("grpc-status-details-bin", b"\xff\xff"),),
            errors.Unavailable, "UNAVAILABLE", None, id="broken details",
        ),
    ],
)  # fmt: skip
async def test_errors_of_other_servers(
    connect: Callable[..., Both],
    code: grpc.StatusCode,
    metadata: tuple[tuple[str, str | bytes], ...],
    kind: type[errors.HyclusterError],
    reason: str,
    retry_after_s: float | None,
) -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(OtherServer(code, metadata), server)  # type: ignore[abstract]
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    with pytest.raises(errors.HyclusterError) as caught:
        await connect(target).call("list_models")
    await server.stop(None)
    came = caught.value
    assert (type(came), came.message) == (kind, "says no")
    assert (came.reason, came.retry_after_s) == (reason, retry_after_s)


async def test_no_server_is_unavailable(connect: Callable[..., Both]) -> None:
    with pytest.raises(errors.Unavailable):
        await connect("127.0.0.1:1").call("generate", MODEL, prompt="a")


async def test_a_message_over_the_limit_is_the_callers_fault(
    stand_in: StandInGenerator, connect: Callable[..., Both]
) -> None:
    async with open_ingress(stand_in, max_message_mib=1) as ingress:
        target = f"127.0.0.1:{ingress.port}"
        for limit in (1, 32):  # refused by the client, by the server
            client = connect(target, max_message_mib=limit)
            with pytest.raises(errors.InvalidInput, match="message larger than max"):
                await client.call("generate", MODEL, prompt="word " * 262_144)


async def test_a_prompt_of_256k_tokens(client: Both, stand_in: StandInGenerator) -> None:
    ids = list(range(262_144))
    assert (await client.call("generate", MODEL, token_ids=ids)).usage.prompt_tokens == 262_144
    assert stand_in.requests[0][0].token_ids == ids
    last = (await client.stream(MODEL, prompt="word " * 262_144))[-1]
    assert last.usage is not None
    assert last.usage.prompt_tokens == 262_144


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_timeout(client: Both, stand_in: StandInGenerator, method: str) -> None:
    stand_in.pause_s = 0.05
    ask: dict[str, Any] = {"prompt": "a", "max_tokens": 10_000, "timeout_s": 1.5}
    with pytest.raises(errors.DeadlineExceeded):
        await (client.stream(MODEL, **ask) if method == "stream" else client.call(method, MODEL, **ask))
    await stand_in.until_idle()
    assert 0 < (stand_in.requests[0][1] or 0) < 1.55


async def test_leaving_a_stream_cancels_it(client: Both, stand_in: StandInGenerator) -> None:
    stand_in.pause_s = 0.05
    assert len(await client.stream(MODEL, prompt="a", max_tokens=10_000, most=2)) == 2
    await stand_in.until_idle()


async def test_cancelling_the_task_cancels_the_call(ingress: GrpcIngress, stand_in: StandInGenerator) -> None:
    stand_in.pause_s = 0.05
    async with AsyncClient(f"127.0.0.1:{ingress.port}") as client:
        task = asyncio.create_task(client.generate(MODEL, prompt="a", max_tokens=10_000))
        await stand_in.until_busy()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stand_in.until_idle()


async def test_a_server_that_shuts_down_is_unavailable(
    ingress: GrpcIngress, client: Both, stand_in: StandInGenerator
) -> None:
    stand_in.pause_s = 0.02
    running = asyncio.create_task(client.call("generate", MODEL, prompt="a", max_tokens=20))
    await stand_in.until_busy()
    stopping = asyncio.create_task(ingress.stop(30))
    failures = []
    for _ in range(10):  # the first of them are still taken, or cross the server's good-bye on the way
        try:
            await client.call("generate", MODEL, prompt="a", max_tokens=1)
        except errors.HyclusterError as error:
            failures.append(type(error))
    assert failures
    assert set(failures) == {errors.Unavailable}
    assert (await running).usage.completion_tokens == 20
    await stopping


@pytest.mark.parametrize("prompt", ["a", "word " * 262_144], ids=["short", "long"])
async def test_unavailable_is_retried_only_when_asked(
    ingress: GrpcIngress, stand_in: StandInGenerator, connect: Callable[..., Both], prompt: str
) -> None:
    target = f"127.0.0.1:{ingress.port}"
    stand_in.error = errors.Unavailable("no replica")
    with pytest.raises(errors.Unavailable):
        await connect(target).call("generate", MODEL, prompt=prompt)
    assert len(stand_in.requests) == 1
    patient = connect(target, retry_unavailable=True)
    stand_in.failures_left = 2
    assert (await patient.call("generate", MODEL, prompt=prompt, request_id="same")).request_id == "same"
    assert len(stand_in.requests) == 4
    stand_in.error, stand_in.failures_left = errors.Overloaded("not a case for a retry"), None
    with pytest.raises(errors.Overloaded):
        await patient.call("generate", MODEL, prompt=prompt)
    assert len(stand_in.requests) == 5


async def test_the_token_is_sent(connect: Callable[..., Both]) -> None:
    seen: list[str | None] = []

    class Refusing(inference_pb2_grpc.InferenceServicer):
        async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
            seen.append(dict(context.invocation_metadata()).get("authorization"))
            return pb.ListModelsResponse()

    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Refusing(), server)  # type: ignore[abstract]
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await connect(target, api_key="secret").call("list_models")
    await connect(target).call("list_models")
    await server.stop(None)
    assert seen == ["Bearer secret", None]


async def test_context_manager_closes(ingress: GrpcIngress) -> None:
    target = f"127.0.0.1:{ingress.port}"

    def in_a_thread() -> None:
        with Client(target) as client:
            assert client.list_models() == [CARD]
        with pytest.raises(ValueError, match="closed channel"):
            client.list_models()

    await asyncio.to_thread(in_a_thread)
    async with AsyncClient(target) as client:
        assert await client.list_models() == [CARD]
    with pytest.raises(grpc.aio.UsageError):
        await client.list_models()


def test_the_typed_fields_are_those_of_sampling() -> None:
    # What a caller may pass is a little wider: any sequence where Sampling holds a tuple.
    widened = {"tuple[str, ...]": "Sequence[str]", "tuple[int, ...]": "Sequence[int]"}
    declared = {name: kind.__forward_arg__ for name, kind in SamplingFields.__annotations__.items()}
    assert declared == {field.name: widened.get(str(field.type), field.type) for field in fields(Sampling)}
    assert typing.is_typeddict(SamplingFields)


def test_the_service_is_the_contracts() -> None:
    assert SERVICE == "hycluster.v1.Inference"


def test_authorities_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ca.pem"
    monkeypatch.setenv(AUTHORITIES_VARIABLE, str(file))
    for said in (None, b"", b"no certificate"):
        if said is not None:
            file.write_bytes(said)
        what = "can't be read: No such file" if said is None else "holds no certificates"
        for connect in (Client, https_context):
            with pytest.raises(errors.SettingsError, match=f"HYCLUSTER_CA: {file} {what}"):
                connect()
