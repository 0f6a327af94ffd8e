"""The gRPC ingress over a real socket, with a stand-in for the pool behind it."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from hycluster import errors
from hycluster.core import GenerationRequest, Priority, Sampling
from hycluster.ingress import grpc as grpc_ingress
from hycluster.ingress.grpc import SERVICE, GrpcIngress, serve_grpc
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.ingress.status import rich_status
from hycluster.settings.ingress import Grpc
from hycluster.settings.load import MAX_MEMBERS
from tests.ingress.stand_in import CARD, MODEL, StandInGenerator, open_ingress
from tests.waiting import PATIENCE_S, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Stub = Any  # InferenceAsyncStub exists for the type checker only
Health: Any = HealthStub  # whose type stub lacks the methods


def ask(**fields: Any) -> pb.GenerateRequest:
    if not {"prompt", "messages", "token_ids"} & fields.keys():
        fields["prompt"] = "one two three"
    return pb.GenerateRequest(model=MODEL, **fields)


async def failure(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """The status, the message and the trailing metadata of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return error.code(), error.details() or "", dict(error.trailing_metadata())


async def status(channel: grpc.aio.Channel, service: str = SERVICE) -> int:
    answer = await Health(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def until_status(channel: grpc.aio.Channel, wanted: int) -> None:
    """Wait until both services have that status."""
    for service in ("", SERVICE):
        watch = Health(channel).Watch(health_pb2.HealthCheckRequest(service=service))
        async with asyncio.timeout(PATIENCE_S):
            async for answer in watch:
                if answer.status == wanted:
                    break
        watch.cancel()
        assert await status(channel, service) == wanted


async def until_closed(port: int) -> None:
    """Wait until nobody listens on the port."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()
            await writer.wait_closed()


async def drained(call: Any) -> None:
    """Read a stream to its end."""
    async for _ in call:
        pass


async def test_generate(stub: Stub) -> None:
    answer = await stub.Generate(ask(request_id="r-1", sampling=pb.Sampling(max_tokens=2)))
    assert answer == pb.GenerateResponse(
        request_id="r-1",
        model=MODEL,
        outputs=[pb.Output(index=0, text="w0 w1 ", token_ids=[0, 1], finish_reason="length")],
        usage=pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1),
    )


async def test_stream_has_a_chunk_a_token_and_usage_in_the_last(stub: Stub) -> None:
    chunks = [chunk async for chunk in stub.GenerateStream(ask(sampling=pb.Sampling(max_tokens=3)))]
    assert [(chunk.text, list(chunk.token_ids), chunk.finish_reason) for chunk in chunks] == [
        ("w0 ", [0], ""),
        ("w1 ", [1], ""),
        ("w2 ", [2], "length"),
    ]
    assert [chunk.HasField("usage") for chunk in chunks] == [False, False, True]
    assert chunks[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1)
    (named,) = {chunk.request_id for chunk in chunks}
    assert named.startswith("gen-")


async def test_first_chunk_comes_before_the_answer_is_complete(stub: Stub, stand_in: StandInGenerator) -> None:
    stand_in.pause_s = 0.05
    call = stub.GenerateStream(ask(sampling=pb.Sampling(max_tokens=1000)))
    async with asyncio.timeout(PATIENCE_S):
        assert (await call.read()).text == "w0 "
    call.cancel()


@pytest.mark.parametrize(
    ("given", "arrives"),
    [
        ({"prompt": "one two"}, {"prompt": "one two"}),
        ({"token_ids": pb.TokenIds(ids=[5, 0, 7])}, {"token_ids": [5, 0, 7]}),
        (
            {"messages": pb.Messages(messages=[pb.ChatMessage(role="user", content="hi", name="Ann")])},
            {"messages": [{"role": "user", "content": "hi", "name": "Ann"}]},
        ),
    ],
)
async def test_every_input_arrives(
    stub: Stub, stand_in: StandInGenerator, given: dict[str, Any], arrives: dict[str, Any]
) -> None:
    await stub.Generate(ask(request_id="r", **given))
    assert stand_in.requests == [(GenerationRequest(model=MODEL, request_id="r", **arrives), None)]


async def test_sampling_priority_and_session_arrive_exactly(stub: Stub, stand_in: StandInGenerator) -> None:
    wanted = Sampling(
        max_tokens=5,
        min_tokens=1,
        temperature=0.7,
        top_p=0.9,
        top_k=0,
        min_p=0.0,
        presence_penalty=-0.3,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        seed=-(2**63),
        stop=("\n\n", "END"),
        stop_token_ids=(2, 0),
        ignore_eos=True,
        n=2,
        logprobs=0,
    )
    sampling = pb.Sampling(**{name: getattr(wanted, name) for name in pb.Sampling.DESCRIPTOR.fields_by_name})
    await stub.Generate(ask(sampling=sampling, priority=pb.BATCH, session_id="s"))
    (request, _), *_ = stand_in.requests
    assert request.sampling == wanted
    assert (request.priority, request.session_id) == (Priority.BATCH, "s")


async def test_several_sequences(stub: Stub) -> None:
    sampling = pb.Sampling(n=3, max_tokens=2)
    whole = await stub.Generate(ask(sampling=sampling))
    assert [(output.index, list(output.token_ids)) for output in whole.outputs] == [
        (0, [0, 1]),
        (1, [100, 101]),
        (2, [200, 201]),
    ]
    assert whole.usage.completion_tokens == 6
    chunks = [chunk async for chunk in stub.GenerateStream(ask(sampling=sampling))]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 0, 1, 2]
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * 5 + [True]


async def test_logprobs(stub: Stub) -> None:
    sampling = pb.Sampling(logprobs=2, max_tokens=2)
    (output,) = (await stub.Generate(ask(sampling=sampling))).outputs
    chunks = [chunk async for chunk in stub.GenerateStream(ask(sampling=sampling))]
    expected = [[(0, "w0", -0.1), (1, "w1", -0.2)], [(1, "w1", -0.1), (2, "w2", -0.2)]]
    for positions in (output.logprobs, [chunk.logprobs[0] for chunk in chunks]):
        assert [[(c.token_id, c.token, c.logprob) for c in p.candidates] for p in positions] == expected


async def test_tokenize(stub: Stub) -> None:
    answer = await stub.Tokenize(pb.TokenizeRequest(model=MODEL, prompt="a bb ccc"))
    assert answer == pb.TokenizeResponse(token_ids=[1, 2, 3], count=3, max_model_len=262_144)
    chat = pb.Messages(messages=[pb.ChatMessage(role="user", content="four five")])
    assert (await stub.Tokenize(pb.TokenizeRequest(model=MODEL, messages=chat))).token_ids == [4, 4]


async def test_tokenize_refuses(stub: Stub) -> None:
    code, message, _ = await failure(stub.Tokenize(pb.TokenizeRequest(model=MODEL)))
    assert (code, "prompt, messages" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    code, message, _ = await failure(stub.Tokenize(pb.TokenizeRequest(model="other", prompt="a")))
    assert (code, "'other'" in message) == (grpc.StatusCode.NOT_FOUND, True)


async def test_list_models(stub: Stub) -> None:
    answer = await stub.ListModels(pb.ListModelsRequest())
    assert answer.models == [pb.Model(name=MODEL, max_model_len=262_144, ready_replicas=2)]


ERRORS = [
    (errors.InvalidInput("prompt: 9 tokens"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated("authorization: no token"), grpc.StatusCode.UNAUTHENTICATED),
    (errors.UnknownModel("x", ["y"]), grpc.StatusCode.NOT_FOUND),
    (errors.Overloaded("too many requests"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable("no replica"), grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.HyclusterError("engine broke"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
async def test_every_error_has_its_status(
    stub: Stub, stand_in: StandInGenerator, error: errors.HyclusterError, code: grpc.StatusCode
) -> None:
    stand_in.error = error
    for call in (
        stub.Generate(ask()),
        stub.GenerateStream(ask()).read(),
        stub.ListModels(pb.ListModelsRequest()),
        stub.Tokenize(pb.TokenizeRequest(model=MODEL, prompt="a")),
    ):
        came, message, metadata = await failure(call)
        assert (came, message) == (code, error.message)
        assert "retry-after-s" not in metadata
        # What gRPC itself says of a broken connection has none.
        assert metadata["hycluster-error"] == type(error).__name__


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
async def test_every_errors_status_has_its_details(
    stub: Stub, stand_in: StandInGenerator, error: errors.HyclusterError, code: grpc.StatusCode
) -> None:
    stand_in.error = error
    unary, stream = stub.Generate(ask()), stub.GenerateStream(ask())
    for call, failed in ((unary, unary), (stream, stream.read())):
        await failure(failed)
        came: Any = await rpc_status.aio.from_call(call)
        assert (came.code, came.message) == (code.value[0], error.message)
        info = ErrorInfo()
        assert came.details[0].Unpack(info)
        assert (info.reason, info.domain) == (error.reason, "hycluster")
        assert dict(info.metadata).items() >= {
            "http_status": str(error.http_status), "http_type": error.openai_type, **error.metadata
        }.items()  # fmt: skip
        assert [detail.TypeName() for detail in came.details if detail.TypeName() == "google.rpc.RetryInfo"] == []
        assert came == rich_status(error, ask())


async def test_a_client_for_threads_reads_the_same_details(ingress: GrpcIngress, stand_in: StandInGenerator) -> None:
    stand_in.error = errors.ReplicaLost("the replica was lost", retry_after_s=1.5)

    def call() -> list[Any]:
        with grpc.insecure_channel(f"127.0.0.1:{ingress.port}") as channel:
            stub: Stub = inference_pb2_grpc.InferenceStub(channel)
            statuses = []
            for ask_ in (lambda: stub.Generate(ask()), lambda: list(stub.GenerateStream(ask()))):
                with pytest.raises(grpc.RpcError) as caught:
                    ask_()
                failed: Any = caught.value
                statuses.append(rpc_status.from_call(failed))
            return statuses

    assert await asyncio.to_thread(call) == [rich_status(stand_in.error)] * 2


async def test_an_error_in_mid_stream_comes_after_the_chunks_before_it(stub: Stub, stand_in: StandInGenerator) -> None:
    stand_in.error, stand_in.error_after = errors.Unavailable("replica lost"), 2
    call = stub.GenerateStream(ask())
    assert [(await call.read()).text for _ in range(2)] == ["w0 ", "w1 "]
    code, *_ = await failure(call.read())
    assert code is grpc.StatusCode.UNAVAILABLE
    assert stand_in.running == 0


async def test_retry_after(stub: Stub, stand_in: StandInGenerator) -> None:
    stand_in.error = errors.Overloaded("too many requests", retry_after_s=1.5)
    *_, metadata = await failure(stub.Generate(ask()))
    assert metadata["retry-after-s"] == "1.5"
    assert metadata["grpc-retry-pushback-ms"] == "1500"
    status, retry = Status.FromString(metadata["grpc-status-details-bin"]), RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_the_unexpected_is_internal_and_logged_but_not_told(
    stub: Stub, stand_in: StandInGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.error = ZeroDivisionError("secret")
    code, message, _ = await failure(stub.Generate(ask()))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in message
    (record,) = [
        record for record in caplog.records if record.name == grpc_ingress.__name__ and "Generate" in record.message
    ]
    assert record.levelno == logging.ERROR
    # Where it was raised; what it says may be of a prompt.
    assert "ZeroDivisionError" in record.message
    assert "stand_in.py" in record.message
    assert "secret" not in caplog.text
    stand_in.error = None
    assert (await stub.Generate(ask())).outputs


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (pb.GenerateRequest(model=MODEL), "prompt, messages, token_ids"),
        (ask(prompt=""), "prompt"),
        (ask(sampling=pb.Sampling(max_tokens=0)), "sampling.max_tokens"),
        (ask(sampling=pb.Sampling(max_tokens=-1)), "sampling.max_tokens"),
        (ask(sampling=pb.Sampling(temperature=float("nan"))), "sampling.temperature"),
        (ask(priority=3), "priority"),
    ],
)
async def test_a_wrong_request_is_refused_by_name(
    stub: Stub, stand_in: StandInGenerator, request_: pb.GenerateRequest, names: str
) -> None:
    for call in (stub.Generate(request_), stub.GenerateStream(request_).read()):
        code, message, metadata = await failure(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert names in message
        status, bad = Status.FromString(metadata["grpc-status-details-bin"]), BadRequest()
        assert status.details[1].Unpack(bad)
        assert ", ".join(violation.field for violation in bad.field_violations) == names
        assert {f"{names}: {violation.description}" for violation in bad.field_violations} == {message}
    assert stand_in.requests == []


async def test_a_message_longer_than_a_header_is_shortened(stub: Stub) -> None:
    code, message, metadata = await failure(stub.Generate(pb.GenerateRequest(model="é" * 100_000, prompt="p")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert message.startswith("model: 'éééé")
    assert Status.FromString(metadata["grpc-status-details-bin"]).message == message


@pytest.mark.parametrize("letter", ["a", "é", "%", "字", "\n", "\ud800"])
async def test_long_messages_and_details_fit_into_headers(stub: Stub, stand_in: StandInGenerator, letter: str) -> None:
    stand_in.error = errors.InvalidInput(f"prompt: {letter * 100_000}", retry_after_s=1)
    stand_in.error.metadata = {"model": letter * 100_000}
    for _ in range(5):  # over its soft bound gRPC refuses some, not all
        call = stub.Generate(ask())
        code, message, _ = await failure(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        came: Any = await rpc_status.aio.from_call(call)
        assert (came.message, len(came.details)) == (message, 3)
        assert len(message.encode()) > 1000


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_the_deadline_reaches_the_generator_and_closes_it(
    stub: Stub, stand_in: StandInGenerator, method: str
) -> None:
    stand_in.pause_s = 0.05
    call = getattr(stub, method)(ask(sampling=pb.Sampling(max_tokens=10_000)), timeout=3)
    code, *_ = await failure(drained(call) if method == "GenerateStream" else call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await stand_in.until_idle()
    ((_, deadline_s),) = stand_in.requests
    assert deadline_s is not None
    assert 0 < deadline_s < 3.05


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_cancelling_closes_the_generator(stub: Stub, stand_in: StandInGenerator, method: str) -> None:
    stand_in.pause_s = 0.05
    call = getattr(stub, method)(ask(sampling=pb.Sampling(max_tokens=10_000)))
    await stand_in.until_busy()
    call.cancel()
    await stand_in.until_idle()


async def test_a_client_that_stops_reading_holds_the_generator_and_its_going_closes_it(
    stub: Stub, stand_in: StandInGenerator
) -> None:
    # Enough words to fill every buffer on the way, so that the ingress process stands in a write, not in the generator.
    sampling = pb.Sampling(max_tokens=1_000_000, n=128, logprobs=20)
    call = stub.GenerateStream(ask(sampling=sampling))
    await call.read()
    await asyncio.sleep(0.3)
    assert stand_in.running == 1
    call.cancel()
    await stand_in.until_idle()


async def test_a_client_that_does_not_read_for_too_long_is_cut_off(stand_in: StandInGenerator) -> None:
    async with (
        open_ingress(stand_in, stalled_client_timeout_s=0.5) as ingress,
        grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}") as channel,
    ):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.GenerateStream(ask(sampling=pb.Sampling(max_tokens=1_000_000, n=128, logprobs=20)))
        await stand_in.until_busy()
        await asyncio.sleep(0.2)
        # Others of the same connection are served meanwhile.
        assert (await stub.Generate(ask())).outputs
        await until(lambda: stand_in.running == 0)
        code, says, _ = await failure(drained(call))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert says == "the stream was not read for 0.5 s"


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        (f"/{SERVICE}/Generate", False),
        (f"/{SERVICE}/GenerateStream", True),
        (f"/{SERVICE}/Tokenize", False),
        (f"/{SERVICE}/CountTokens", False),
        (f"/{SERVICE}/ListModels", False),
        ("/grpc.health.v1.Health/Check", False),
        ("/grpc.health.v1.Health/Watch", True),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", True),
    ],
)
async def test_what_is_no_message_is_the_callers_fault(channel: Any, method: str, streams: bool) -> None:
    if "Reflection" in method:
        call = channel.stream_stream(method)(iter([b"\xff\xff"]))
    else:
        call = (channel.unary_stream if streams else channel.unary_unary)(method)(b"\xff\xff")
    code, says, metadata = await failure(drained(call) if streams else call)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert says == "request: is not a message of the kind that this method takes"
    assert metadata["hycluster-error"] == "InvalidInput"
    assert Status.FromString(metadata["grpc-status-details-bin"]).message == says


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": pb.Messages(messages=[pb.ChatMessage()] * (MAX_MEMBERS + 1))},
        {"prompt": "x", "sampling": pb.Sampling(stop=["x"] * (MAX_MEMBERS + 1))},
        {"prompt": "x", "structured_output": pb.StructuredOutput(json_schema="[" * (MAX_MEMBERS + 1))},
    ],
    ids=["messages", "stop", "JSON"],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_what_has_too_much_in_it_is_not_taken_apart(
    stub: Stub, stand_in: StandInGenerator, method: str, asked: dict[str, Any]
) -> None:
    call = getattr(stub, method)(ask(**asked))
    code, says, metadata = await failure(drained(call) if method == "GenerateStream" else call)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert says.startswith(f"request: has more than {MAX_MEMBERS} members")
    assert metadata["hycluster-error"] == "TooManyMembers"
    assert not stand_in.requests


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_ids_that_no_context_holds_are_not_taken_out(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("hycluster.ingress.translate.request_from_pb", taken.append)
    call = getattr(stub, method)(ask(token_ids=pb.TokenIds(ids=[1] * (CARD.max_model_len + 1))))
    code, says, metadata = await failure(drained(call) if method == "GenerateStream" else call)
    assert (code, metadata["hycluster-error"]) == (grpc.StatusCode.INVALID_ARGUMENT, "PromptTooLong")
    assert says.startswith(f"token_ids: has {CARD.max_model_len + 1} tokens, too long for a context of")
    assert not taken


async def test_a_call_whose_request_does_not_come_keeps_nobodys_place(stand_in: StandInGenerator) -> None:
    never = asyncio.Event()

    async def nothing() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with (
        open_ingress(stand_in, max_calls=2, stalled_client_timeout_s=0.5) as ingress,
        grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}") as channel,
    ):
        call_of: Any = channel.stream_unary
        calls = [call_of(f"/{SERVICE}/{name}")(nothing()) for name in ("Generate", "Tokenize")]
        async with asyncio.timeout(PATIENCE_S):
            for call in calls:
                code, says, _ = await failure(call)
                assert (code, says) == (grpc.StatusCode.DEADLINE_EXCEEDED, "request: did not come within 0.5 s")
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        assert (await stub.Generate(ask())).outputs


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_call_without_a_request(channel: Any, method: str) -> None:
    kind = channel.stream_stream if method == "GenerateStream" else channel.stream_unary
    call = kind(f"/{SERVICE}/{method}")(iter([]))
    async with asyncio.timeout(PATIENCE_S):
        code, says, _ = await failure(drained(call) if method == "GenerateStream" else call)
    assert (code, says) == (grpc.StatusCode.INVALID_ARGUMENT, "request: is missing; this method takes one")


async def test_no_such_method(channel: Any) -> None:
    code, _, _ = await failure(channel.unary_unary(f"/{SERVICE}/Nothing")(b""))
    assert code == grpc.StatusCode.UNIMPLEMENTED


async def test_calls_over_the_bound_are_refused(stand_in: StandInGenerator) -> None:
    stand_in.pause_s = 0.05
    async with (
        open_ingress(stand_in, max_calls=2) as ingress,
        grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}") as channel,
    ):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        calls = [stub.GenerateStream(ask(sampling=pb.Sampling(max_tokens=10_000))) for _ in range(2)]
        for call in calls:
            await call.read()
        code, _, _ = await failure(stub.Generate(ask()))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        await stand_in.until_idle()
        await asyncio.sleep(0.1)
        assert (await stub.Generate(ask())).outputs


async def test_a_prompt_of_256k_tokens_as_ids(stub: Stub, stand_in: StandInGenerator) -> None:
    ids = list(range(262_144))
    answer = await stub.Generate(ask(token_ids=pb.TokenIds(ids=ids)))
    assert answer.usage.prompt_tokens == 262_144
    assert stand_in.requests[0][0].token_ids == ids


async def test_a_prompt_of_256k_tokens_as_text(stub: Stub, stand_in: StandInGenerator) -> None:
    text = "word " * 262_144
    answer = await stub.Generate(ask(prompt=text))
    assert answer.usage.prompt_tokens == 262_144
    assert stand_in.requests[0][0].prompt == text


async def test_a_message_over_the_limit_is_refused(stand_in: StandInGenerator) -> None:
    async with (
        open_ingress(stand_in, max_message_mib=1) as ingress,
        grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}") as channel,
    ):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        code, *_ = await failure(stub.Generate(ask(prompt="word " * 262_144)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Generate(ask())).outputs


async def test_health_follows_the_generator(channel: grpc.aio.Channel, stand_in: StandInGenerator) -> None:
    assert await status(channel, "") == await status(channel) == SERVING
    stand_in.is_ready = False
    await until_status(channel, NOT_SERVING)
    stand_in.is_ready = True
    await until_status(channel, SERVING)
    stand_in.error = errors.Unavailable("no replica")
    await until_status(channel, NOT_SERVING)
    stand_in.error = None
    await until_status(channel, SERVING)


async def test_health_is_true_from_the_first_call_on(stand_in: StandInGenerator) -> None:
    stand_in.is_ready = False
    ingress = await serve_grpc(stand_in, Grpc(port=0), ready_poll_s=60)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}") as channel:
        assert await status(channel) == NOT_SERVING
    await ingress.stop(0)


async def test_a_generator_that_does_not_answer_is_not_ready(
    channel: grpc.aio.Channel, stand_in: StandInGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> bool:
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(grpc_ingress, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(stand_in, "ready", hang)
    await until_status(channel, NOT_SERVING)


async def test_stop_lets_calls_finish_and_takes_no_new_ones(
    stub: Stub, channel: grpc.aio.Channel, stand_in: StandInGenerator, ingress: GrpcIngress
) -> None:
    stand_in.pause_s = 0.05
    watch = Health(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == SERVING
    call = stub.GenerateStream(ask(sampling=pb.Sampling(max_tokens=20)))
    chunks = aiter(call)
    await anext(chunks)
    began = time.monotonic()
    stopping = asyncio.create_task(ingress.stop(600))
    assert (await watch.read()).status == NOT_SERVING
    await until_closed(ingress.port)
    # Over a connection of its own: on the old one a call may cross the server's good-bye, and ends as CANCELLED.
    apart = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ingress.port}", apart) as other:
        code, *_ = await failure(inference_pb2_grpc.InferenceStub(other).Generate(ask()))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert len([chunk async for chunk in chunks]) == 19
    await stopping
    assert time.monotonic() - began < 120, "a client that watches the health must not hold the drain"


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_calls_left_after_the_grace_end_as_unavailable(
    stub: Stub, stand_in: StandInGenerator, ingress: GrpcIngress, method: str
) -> None:
    stand_in.pause_s = 0.05
    call = getattr(stub, method)(ask(sampling=pb.Sampling(max_tokens=10_000)))
    await stand_in.until_busy()
    began = time.monotonic()
    await ingress.stop(0.2)
    assert time.monotonic() - began < 60, "they would have taken 500 s"
    assert stand_in.running == 0
    code, message, _ = await failure(drained(call) if method == "GenerateStream" else call)
    assert (code, "shut down" in message) == (grpc.StatusCode.UNAVAILABLE, True)


def call_by_reflection(port: int) -> tuple[set[str], dict[str, Any], list[dict[str, Any]]]:
    """What a stranger's generic client does: knows the address and the names of the contract, no code of ours."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("hycluster.v1.Inference")
        generate, stream = (service.methods_by_name[name] for name in ("Generate", "GenerateStream"))
        request_class, answer_class, chunk_class = map(
            message_factory.GetMessageClass, (generate.input_type, generate.output_type, stream.output_type)
        )
        request = json_format.ParseDict(
            {"model": MODEL, "prompt": "one two", "sampling": {"max_tokens": 2, "temperature": 0}}, request_class()
        )
        answer = channel.unary_unary(
            "/hycluster.v1.Inference/Generate", request_class.SerializeToString, answer_class.FromString
        )(request)
        chunks = channel.unary_stream(
            "/hycluster.v1.Inference/GenerateStream", request_class.SerializeToString, chunk_class.FromString
        )(request)
        as_dict = [
            json_format.MessageToDict(message, preserving_proto_field_name=True) for message in (answer, *chunks)
        ]
        return set(database.get_services()), as_dict[0], as_dict[1:]


REFLECTIONS = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


@pytest.mark.parametrize("version", REFLECTIONS)
async def test_reflection_answers_in_both_versions(channel: Any, version: str) -> None:
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in (SERVICE, version)),
    ]
    call = channel.stream_stream(
        f"/{version}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(iter(asked))
    listed, ours, itself = [answer async for answer in call]
    assert set(REFLECTIONS) < {service.name for service in listed.list_services_response.service}
    (file,) = map(FileDescriptorProto.FromString, ours.file_descriptor_response.file_descriptor_proto)
    assert file.package == "hycluster.v1"
    (file,) = map(FileDescriptorProto.FromString, itself.file_descriptor_response.file_descriptor_proto)
    (service,) = file.service
    (method,) = service.method
    assert f"{file.package}.{service.name}" == version
    # Else a client can't build what it asks for.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    assert pool.FindMethodByName(f"{version}.{method.name}").input_type.full_name.startswith(file.package)


async def test_a_client_that_knows_only_reflection(ingress: GrpcIngress) -> None:
    services, answer, chunks = await asyncio.to_thread(call_by_reflection, ingress.port)
    assert services == {SERVICE, "grpc.health.v1.Health", *REFLECTIONS}
    assert answer["outputs"] == [{"text": "w0 w1 ", "token_ids": [0, 1], "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 1}
    assert "".join(chunk["text"] for chunk in chunks) == "w0 w1 "
    assert chunks[-1]["usage"]["completion_tokens"] == 2


async def test_a_port_in_use_is_a_settings_error(stand_in: StandInGenerator) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.SettingsError, match=rf"^grpc\.port: {port} on .*Address already in use"):
            await serve_grpc(stand_in, Grpc(port=port))
        with pytest.raises(errors.SettingsError, match=rf"^grpc\.port: {port} on .* can't be opened"):
            await serve_grpc(stand_in, Grpc(port=port), reuse_port=True)


async def test_a_host_that_is_not_here_is_a_settings_error(stand_in: StandInGenerator) -> None:
    with pytest.raises(errors.SettingsError, match=r"grpc\.port: 0 on 192\.0\.2\.1 can't be opened"):
        await serve_grpc(stand_in, Grpc(host="192.0.2.1", port=0))


async def test_ingress_processes_share_a_port_only_when_asked_to(stand_in: StandInGenerator) -> None:
    first = await serve_grpc(stand_in, Grpc(port=0), reuse_port=True)
    second = await serve_grpc(stand_in, Grpc(port=first.port), reuse_port=True)
    assert second.port == first.port
    with pytest.raises(errors.SettingsError):
        await serve_grpc(stand_in, Grpc(port=first.port))
    await first.stop(0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{second.port}") as channel:
        assert (await inference_pb2_grpc.InferenceStub(channel).Generate(ask())).outputs
    await second.stop(0)
