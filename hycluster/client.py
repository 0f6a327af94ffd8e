"""The typed Python client of the gRPC ingress, for threads (``Client``) and for asyncio (``AsyncClient``).

    with Client("127.0.0.1:9000") as client:
        for delta in client.stream("my-model", prompt="Once", max_tokens=20):
            print(delta.text, end="")

Both raise the errors of :mod:`hycluster.errors` that the server raised, found by the call's status: ``reason`` and
``metadata`` are its ``ErrorInfo``'s, ``retry_after_s`` is its ``RetryInfo``'s; docs/errors.md lists them.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from hycluster.core import ChatFields, Generation, GenerationRequest, ModelCard, Priority, Sampling, StructuredOutput
from hycluster.errors import (
    BY_REASON,
    DeadlineExceeded,
    HyclusterError,
    InvalidInput,
    KillsReplicas,
    Overloaded,
    PermissionDenied,
    SettingsError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    remade,
)
from hycluster.ingress import arguments, status, translate
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto.inference_pb2_grpc import InferenceStub
from hycluster.timeline import current

DEFAULT_TARGET = "127.0.0.1:9000"
KEY_VARIABLE, AUTHORITIES_VARIABLE = "HYCLUSTER_API_KEY", "HYCLUSTER_CA"
SERVICE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
ERRORS: dict[str, type[HyclusterError]] = {
    kind.grpc_status: kind
    for kind in (
        DeadlineExceeded, InvalidInput, KillsReplicas, Overloaded, PermissionDenied, Unauthenticated, Unavailable,
        UnknownModel,
    )
}  # fmt: skip
# gRPC's own word for a call that reached a server just as it shut down; ours to cancel raises no error.
ERRORS["CANCELLED"] = Unavailable


class SamplingFields(TypedDict, total=False):
    """The fields of :class:`hycluster.core.Sampling`."""

    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float | None
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    logprobs: int | None


class Ask(SamplingFields, total=False):
    """The keyword arguments of ``generate`` and ``stream``.

    Exactly one of ``prompt`` (text), ``messages`` (chat, OpenAI's form) and ``token_ids``. Sampling is either
    ``sampling`` or its fields one by one. ``timeout_s`` is the deadline of the whole call in seconds; None is none.
    The others are those of :class:`hycluster.core.GenerationRequest`: tools, tool calls and the pieces of a message are
    in OpenAI's form, as they are over HTTP.
    ``job`` names the bulk job that a request at batch priority belongs to: the ingress then has as many of a job's
    requests in the engines as these have room for, and lets the others wait.
    """

    prompt: str | None
    messages: Sequence[dict[str, Any]] | None
    token_ids: Sequence[int] | None
    sampling: Sampling | None
    priority: Priority
    request_id: str | None
    session_id: str | None
    structured_output: StructuredOutput | None
    tools: Sequence[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool
    include_reasoning: bool
    reasoning_effort: str | None
    chat_template_kwargs: dict[str, Any] | None
    job: str | None
    timeout_s: float | None


def key_header(api_key: str | None = None) -> dict[str, str]:
    """What says who calls, over HTTP and in gRPC's metadata: this key, or that of the environment, or nothing."""
    api_key = api_key or os.environ.get(KEY_VARIABLE)
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def trusted_authorities() -> bytes | None:
    """The certificates (PEM) in the file that ``HYCLUSTER_CA`` names; None where it names none.

    Raises:
        SettingsError: there is no such file, or nothing of that kind in it.
    """
    file = os.environ.get(AUTHORITIES_VARIABLE)
    if not file:
        return None
    try:
        found = Path(file).read_bytes()
        # gRPC looks at them when it connects, and then says that nobody answers.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise SettingsError(f"{AUTHORITIES_VARIABLE}: {file} holds no certificates (PEM)") from None
    except OSError as error:
        raise SettingsError(f"{AUTHORITIES_VARIABLE}: {file} can't be read: {error.strerror}") from None
    return found


def https_context() -> ssl.SSLContext:
    """What verifies an HTTP ingress: by ``HYCLUSTER_CA``, or by the machine's own authorities.

    Raises:
        SettingsError: as :func:`trusted_authorities`.
    """
    named = None if trusted_authorities() is None else os.environ[AUTHORITIES_VARIABLE]
    return ssl.create_default_context(cafile=named)


class _Connection:
    """What both clients share: how to connect and how to ask.

    Args:
        target: ``host:port``.
        api_key: sent as ``authorization: Bearer ...``; an API key or a token. None: ``HYCLUSTER_API_KEY`` of the
            environment, if there is one.
        credentials: for TLS; None is plain text, or, with ``HYCLUSTER_CA`` in the environment, TLS with a server
            that the certificates in that file vouch for.
        retry_unavailable: let gRPC repeat a call, other than a stream, that met UNAVAILABLE: up to 4 attempts
            with growing pauses, all within ``timeout_s``.
        max_message_mib: the server's ``grpc.max_message_mib``.

    Raises:
        SettingsError: ``HYCLUSTER_CA`` names no file of certificates.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retry_unavailable: bool = False,
        max_message_mib: int = 32,
    ) -> None:
        self.target = target
        self._metadata = tuple(key_header(api_key).items())
        if credentials is None and (authorities := trusted_authorities()):
            credentials = grpc.ssl_channel_credentials(authorities)
        self._connect(credentials, _options(retry_unavailable, max_message_mib * 2**20))

    def _connect(self, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, Any]]) -> None:
        raise NotImplementedError


class Client(_Connection):
    """A connection for threads; any number of them may share it. Use it as a context manager or ``close`` it."""

    def _connect(self, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, Any]]) -> None:
        self._channel = (
            grpc.secure_channel(self.target, credentials, options)
            if credentials
            else grpc.insecure_channel(self.target, options)
        )
        self._inference = InferenceStub(self._channel)
        self._health: Any = HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def generate(self, model: str, **ask: Unpack[Ask]) -> Generation:
        """The whole answer. See :class:`Ask` for the arguments."""
        with _own_errors():
            answer = self._inference.Generate(
                _request(model, ask), timeout=ask.get("timeout_s"), metadata=self._metadata
            )
        return translate.response_from_pb(answer)

    def stream(self, model: str, **ask: Unpack[Ask]) -> Generator[Generation]:
        """The answer in deltas, the last one with the usage. Closing the generator cancels the call.

        The call starts with the first ``next``; wrong arguments raise at once.
        """
        return self._stream(model, _request(model, ask), ask.get("timeout_s"))

    def _stream(self, model: str, request: pb.GenerateRequest, timeout_s: float | None) -> Generator[Generation]:
        metadata = (*self._metadata, *_trace())
        call = self._inference.GenerateStream(request, timeout=timeout_s, metadata=metadata)
        try:
            with _own_errors():
                for chunk in call:
                    yield translate.chunk_from_pb(model, chunk)
        finally:
            call.cancel()

    def tokenize(
        self,
        model: str,
        *,
        prompt: str | None = None,
        messages: Sequence[dict[str, Any]] | None = None,
        timeout_s: float | None = None,
        **chat: Unpack[ChatFields],
    ) -> list[int]:
        """The token ids of a text, or of a chat by way of the model's template, which may depend on its tools."""
        with _own_errors():
            answer = self._inference.Tokenize(
                _tokenize_request(model, prompt, messages, timeout_s, chat),
                timeout=timeout_s,
                metadata=self._metadata,
            )
        return list(answer.token_ids)

    def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float | None = None) -> list[int]:
        """How many tokens each text has, special ones aside."""
        with _own_errors():
            answer = self._inference.CountTokens(
                _count_request(model, texts, timeout_s), timeout=timeout_s, metadata=self._metadata
            )
        return list(answer.counts)

    def list_models(self, *, timeout_s: float | None = None) -> list[ModelCard]:
        """The models served here."""
        with _own_errors():
            answer = self._inference.ListModels(pb.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata)
        return translate.models_from_pb(answer)

    def ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a request would succeed now; False too if there is no server at the target."""
        try:
            with _own_errors():
                answer = self._health.Check(
                    health_pb2.HealthCheckRequest(service=SERVICE), timeout=timeout_s, metadata=self._metadata
                )
        except (Unavailable, DeadlineExceeded):
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class AsyncClient(_Connection):
    """A connection for asyncio; make it in the event loop that uses it.

    Cancelling a task that waits here cancels its call.
    """

    def _connect(self, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, Any]]) -> None:
        self._channel = (
            grpc.aio.secure_channel(self.target, credentials, options)
            if credentials
            else grpc.aio.insecure_channel(self.target, options)
        )
        self._inference = InferenceStub(self._channel)
        self._health: Any = HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()

    async def generate(self, model: str, **ask: Unpack[Ask]) -> Generation:
        """The whole answer. See :class:`Ask` for the arguments."""
        with _own_errors():
            answer = await self._inference.Generate(
                _request(model, ask), timeout=ask.get("timeout_s"), metadata=(*self._metadata, *_trace())
            )
        return translate.response_from_pb(answer)

    def stream(self, model: str, **ask: Unpack[Ask]) -> AsyncGenerator[Generation]:
        """The answer in deltas, the last one with the usage. Closing the generator cancels the call.

        The call starts with the first ``anext``; wrong arguments raise at once.
        """
        return self._stream(model, _request(model, ask), ask.get("timeout_s"))

    async def _stream(
        self, model: str, request: pb.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Generation]:
        metadata = (*self._metadata, *_trace())
        call = self._inference.GenerateStream(request, timeout=timeout_s, metadata=metadata)
        try:
            with _own_errors():
                async for chunk in call:
                    yield translate.chunk_from_pb(model, chunk)
        finally:
            call.cancel()

    async def tokenize(
        self,
        model: str,
        *,
        prompt: str | None = None,
        messages: Sequence[dict[str, Any]] | None = None,
        timeout_s: float | None = None,
        **chat: Unpack[ChatFields],
    ) -> list[int]:
        """The token ids of a text, or of a chat by way of the model's template, which may depend on its tools."""
        with _own_errors():
            answer = await self._inference.Tokenize(
                _tokenize_request(model, prompt, messages, timeout_s, chat),
                timeout=timeout_s,
                metadata=self._metadata,
            )
        return list(answer.token_ids)

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float | None = None) -> list[int]:
        """How many tokens each text has, special ones aside."""
        with _own_errors():
            answer = await self._inference.CountTokens(
                _count_request(model, texts, timeout_s), timeout=timeout_s, metadata=self._metadata
            )
        return list(answer.counts)

    async def list_models(self, *, timeout_s: float | None = None) -> list[ModelCard]:
        """The models served here."""
        with _own_errors():
            answer = await self._inference.ListModels(
                pb.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata
            )
        return translate.models_from_pb(answer)

    async def ready(self, *, timeout_s: float = 5.0) -> bool:
        """Whether a request would succeed now; False too if there is no server at the target."""
        try:
            with _own_errors():
                answer = await self._health.Check(
                    health_pb2.HealthCheckRequest(service=SERVICE), timeout=timeout_s, metadata=self._metadata
                )
        except (Unavailable, DeadlineExceeded):
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _trace() -> tuple[tuple[str, str], ...]:
    """What the call is a part of, where that is a request of ours: a job's row that is asked through an ingress."""
    timeline = current.get()
    if timeline is None:
        return ()
    # Of what is not recorded here the call is a part of whatever has asked for it: the service may record.
    context = timeline.call() if timeline.sampled else timeline.parent
    return tuple(context.headers.items()) if context is not None else ()


def _request(model: str, ask: Ask) -> pb.GenerateRequest:
    return translate.request_to_pb(_wanted(model, ask))


def _wanted(model: str, ask: Ask) -> GenerationRequest:
    arguments.check_argument_names(ask, Ask.__annotations__)
    # What is None is as if it were not given.
    given: dict[str, Any] = {name: value for name, value in ask.items() if value is not None}
    sampling = {name: given.pop(name) for name in SAMPLING_FIELDS if name in given}
    arguments.check_arguments(model=model, **given)
    given.pop("timeout_s", None)
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = (sampling["stop"],)
    if "sampling" not in given:
        given["sampling"] = Sampling(**sampling)
    elif sampling:
        raise InvalidInput(f"sampling: give it, or its fields, not both; given are also {', '.join(sampling)}")
    if "token_ids" in given:
        given["token_ids"] = arguments.token_ids(given["token_ids"])
    if "messages" in given:
        given["messages"] = list(given["messages"])
    if "tools" in given:
        given["tools"] = list(given["tools"])
    return GenerationRequest(model=model, **given)


def _tokenize_request(
    model: str,
    prompt: str | None,
    messages: Sequence[dict[str, Any]] | None,
    timeout_s: float | None,
    chat: ChatFields,
) -> pb.TokenizeRequest:
    arguments.check_argument_names(chat, ("prompt", "messages", "timeout_s", *ChatFields.__annotations__))
    # The request of Generate has the same rules, so let it judge.
    ask: Any = {"prompt": prompt, "messages": messages, "timeout_s": timeout_s, **chat}
    return translate.tokenize_to_pb(_wanted(model, ask))


def _count_request(model: str, texts: Sequence[str], timeout_s: float | None) -> pb.CountTokensRequest:
    arguments.check_arguments(model=model, texts=texts, timeout_s=timeout_s)
    try:
        return pb.CountTokensRequest(model=model, texts=texts)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"texts: {error}") from None


def _options(retry_unavailable: bool, max_bytes: int) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        # Two clients have two connections, so that ingress processes that share a port, or a balancer, can tell them
        # apart.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    if retry_unavailable:
        methods = [
            {"service": SERVICE, "method": name} for name in ("Generate", "Tokenize", "CountTokens", "ListModels")
        ]
        policy = {
            "maxAttempts": 4,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": [code for code, kind in ERRORS.items() if kind is Unavailable],
        }
        options += [
            ("grpc.service_config", json.dumps({"methodConfig": [{"name": methods, "retryPolicy": policy}]})),
            # gRPC repeats only what its buffer holds, 256 KiB by default; a long prompt is more.
            ("grpc.per_rpc_retry_buffer_size", max_bytes),
        ]
    return options


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _own_error(error) from error


def _own_error(failure: Any) -> HyclusterError:
    """The error for a failed call (``grpc.RpcError`` does not declare the methods that every one has)."""
    message = failure.details() or failure.code().name
    kind = ERRORS.get(failure.code().name, HyclusterError)
    # gRPC's own limits have the status that means "come back later" here, but will never let this message through.
    if kind is Overloaded and "message larger than max" in message:
        kind = InvalidInput
    details = status.told(failure)
    # Of the kinds of one status the reason tells which; one that only newer servers know is told all the same.
    precise = BY_REASON.get(details.reason or "", kind)
    error = remade(precise if precise.grpc_status == kind.grpc_status else kind, message)
    error.retry_after_s = _retry_after_s(failure, details)
    error.reason = details.reason or error.reason
    error.metadata = details.metadata or {}
    return error


def _retry_after_s(failure: Any, details: status.StatusDetails) -> float | None:
    if details.retry_after_s is not None:
        return details.retry_after_s
    # Servers without details say it here only.
    said = dict(failure.trailing_metadata() or ()).get(status.RETRY_AFTER_KEY)
    return None if said is None else float(said)
