"""The gRPC ingress: a thin servicer over a generator, with health, reflection and a drain.

Deadlines and cancellation need no code of their own in the calls: grpc.aio cancels a call's task when the
client cancels or its deadline passes, and leaving the task closes the generator, which aborts the request.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from hycluster.auth.caller import check_model, check_scope, current_caller, usable
from hycluster.auth.guard import Guard
from hycluster.core import Generation, GenerationRequest, ModelCard, PromptFields
from hycluster.errors import DeadlineExceeded, HyclusterError, PromptTooLong, SettingsError, Unavailable, UnknownModel
from hycluster.gateway.places import holding_places
from hycluster.gateway.tiers import served_as, tier_for
from hycluster.ingress import translate
from hycluster.ingress.chats import messages_from_pb
from hycluster.ingress.errors import raised_at
from hycluster.ingress.guarded_calls import GuardCalls
from hycluster.ingress.malformed import RefuseMalformed
from hycluster.ingress.proto import inference_pb2 as pb
from hycluster.ingress.proto import inference_pb2_grpc
from hycluster.ingress.reflection import enable_reflection
from hycluster.ingress.status import abort
from hycluster.ingress.tls import Certificate
from hycluster.ledger.account import account_book, account_now
from hycluster.observe.ingresses import grpc_began, grpc_ended
from hycluster.observe.timelines import Carried
from hycluster.settings.ingress import Grpc
from hycluster.settings.load import MAX_MEMBERS
from hycluster.timeline import Timeline, exemplar
from hycluster.trace_context import trace_context, written_id

logger = logging.getLogger(__name__)

SERVICE: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name
READY_TIMEOUT_S = 5.0
# In the metadata at the end of each call; in that at its beginning, a caller may give one.
REQUEST_ID_KEY = "x-request-id"
MAX_ID = 512
# Likewise: the tier that is asked for, and which it got.
TIER_KEY = "x-service-tier"
# Within this time a client hears that the ingress process closes, and what it has sent until then has arrived.
SETTLE_S = 0.5
# How often a client may ping. Clients say 10 s at the least (gRPC's own word for it is a bound on theirs), and a ping
# may catch up with the one before it.
PINGS_AT_LEAST_MS = 5000
# By then a connection has begun to speak HTTP/2, or is closed.
HANDSHAKE_S = 10.0

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Call = Callable[["InferenceServicer", Request, Context], Awaitable[Response]]


class GrpcBackend(Protocol):
    """What the gRPC ingress asks of the pool behind it. Every method may raise a :class:`HyclusterError`."""

    async def models(self) -> list[ModelCard]:
        """The models served, ready or not."""

    def model_of(self, name: str) -> str | None:
        """The model that a name stands for: its own, or one of its adapters'; None if nothing has that name."""

    def stream(
        self, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[Generation, None]:
        """Deltas; the last one carries the usage. Closing the generator aborts the request in the engine."""

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        """The whole answer. Cancelling the call aborts the request in the engine."""

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        """The token ids of a text or of a chat. With neither it raises ``InvalidInput``."""

    async def count_tokens(self, model: str, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, special ones aside."""

    async def ready(self) -> bool:
        """Whether a request would succeed now."""


def _answer(call: Call[Request, Response]) -> Call[Request, Response]:
    """Count a call as in flight, and end it with the status that its error knows."""

    @functools.wraps(call)
    async def answered(self: InferenceServicer, request: Request, context: Context) -> Response:
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.add(task)
        began_s, code = time.perf_counter(), "CANCELLED"
        said = _said(context)
        request_id = _name(request, said)
        trailing: tuple[tuple[str, str], ...] = ((REQUEST_ID_KEY, request_id),)
        context.set_trailing_metadata(trailing)
        timeline: Timeline | None = None
        grpc_began()
        try:
            _check_allowed(request)
            if isinstance(request, pb.GenerateRequest):
                operation = f"grpc {call.__name__}"
                tier = tier_for(said.get(TIER_KEY, "default"))
                if TIER_KEY in said:
                    trailing = (*trailing, (TIER_KEY, tier))
                    context.set_trailing_metadata(trailing)
                with (
                    served_as(tier),
                    Carried(request_id, operation, trace_context(said), model=request.model) as timeline,
                    account_book.account(request_id, operation),
                    holding_places(),
                ):
                    answer = await call(self, request, context)
            else:
                answer = await call(self, request, context)
            code = "OK"
            return answer
        except HyclusterError as error:
            failure = error
            code = error.grpc_status
        except asyncio.CancelledError:
            # Either the client has gone, then there is nobody to tell, or the drain ran out of time.
            if not self.closing or context.done():
                raise
            code = Unavailable.grpc_status
            failure = Unavailable("the server shut down before the answer was complete")
        except Exception as error:
            logger.error("%s failed: %s", call.__name__, raised_at(error))
            code = HyclusterError.grpc_status
            failure = HyclusterError("internal error; the server's log has the details")
        finally:
            self.in_flight.discard(task)
            model = self.model_of(getattr(request, "model", ""))
            grpc_ended(model, SERVICE, call.__name__, code, time.perf_counter() - began_s, exemplar(timeline))
        await abort(context, failure, request, trailing)
        raise AssertionError("abort always raises")

    return answered


def _check_allowed(request: Message) -> None:
    if (model := getattr(request, "model", None)) is not None:
        check_model(model)
    if isinstance(request, pb.GenerateRequest) and request.priority == pb.BATCH:
        check_scope("batch", "priority")


def _said(context: Context) -> dict[str, str]:
    """What a call's metadata says in text."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def _name(request: Message, said: Mapping[str, str]) -> str:
    """A request's id, which its caller has given, by its field or as over HTTP, or is told."""
    request_id = said.get(REQUEST_ID_KEY) or f"gen-{secrets.token_hex(12)}"
    if isinstance(request, pb.GenerateRequest):
        request_id = request.request_id = request.request_id or request_id
    # What the field holds is checked where it is used.
    return written_id(request_id[:MAX_ID])[:MAX_ID]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The calls of ``hycluster.v1.Inference``.

    Args:
        stall_s: how long a caller may leave a chunk of its stream unread.
    """

    def __init__(self, generator: GrpcBackend, stall_s: float) -> None:
        self._generator = generator
        self._stall_s = stall_s
        self._closing: set[asyncio.Task[None]] = set()
        self.in_flight: set[asyncio.Task[Any]] = set()
        self.closing = False

    def model_of(self, name: str) -> str:
        """The model that a name stands for; empty if nothing has that name."""
        return self._generator.model_of(name) or ""

    @_answer
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        wanted = await self._wanted(request)
        return translate.response_to_pb(await self._generator.generate(wanted, deadline_s=context.time_remaining()))

    # Writes rather than yields: a generator left by grpc.aio at a yield would be closed only when collected.
    @_answer
    async def GenerateStream(  # type: ignore[override]  # grpc.aio takes both, the generated type only yielding
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        wanted = await self._wanted(request)
        loop, unread = asyncio.get_running_loop(), asyncio.Event()
        async with aclosing(self._generator.stream(wanted, deadline_s=context.time_remaining())) as deltas:

            def give_up() -> None:
                unread.set()
                self._closing.add(closing := loop.create_task(deltas.aclose()))
                closing.add_done_callback(self._closing.discard)

            async for delta in deltas:
                for chunk in translate.chunks_to_pb(delta):
                    # Waits while HTTP/2's flow control has no room; the deltas that come meanwhile grow into one. It
                    # can't be cut short: gRPC has no way to take a message back.
                    if (account := account_now.get()) is not None:
                        account.settle()
                    patience = loop.call_later(self._stall_s, give_up)
                    try:
                        await context.write(chunk)
                    finally:
                        patience.cancel()
                    if unread.is_set():
                        raise DeadlineExceeded(f"the stream was not read for {self._stall_s:g} s")

    async def _wanted(self, request: pb.GenerateRequest) -> GenerationRequest:
        # A byte is enough for a token id, and Python takes eight for it, several times over.
        tokens = len(request.token_ids.ids)
        for card in await self._generator.models() if tokens else ():
            if card.name == request.model and tokens > card.max_model_len:
                raise PromptTooLong(f"token_ids: has {tokens} tokens, too long for a context of {card.max_model_len}")
        return translate.request_from_pb(request)

    @_answer
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        given = request.WhichOneof("input")
        ids = await self._generator.tokenize(
            request.model,
            prompt=request.prompt if given == "prompt" else None,
            messages=messages_from_pb(request.messages) if given == "messages" else None,
            **translate.chat_fields_from_pb(request),
        )
        cards = {card.name: card for card in await self._generator.models()}
        if request.model not in cards:
            raise UnknownModel(request.model, usable(cards))
        return pb.TokenizeResponse(token_ids=ids, count=len(ids), max_model_len=cards[request.model].max_model_len)

    @_answer
    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        return pb.CountTokensResponse(counts=await self._generator.count_tokens(request.model, request.texts))

    @_answer
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        caller = current_caller.get()
        cards = await self._generator.models()
        return translate.models_to_pb([card for card in cards if caller is None or caller.may_use(card.name)])

    async def drain(self, grace_s: float) -> None:
        """Wait for the calls in flight; end those that are left after ``grace_s`` seconds with UNAVAILABLE."""
        try:
            async with asyncio.timeout(grace_s):
                quiet = False
                while not quiet:
                    while self.in_flight:
                        await asyncio.wait(self.in_flight.copy())
                    # A call that was sent before its client had heard of the end may begin only now.
                    await asyncio.sleep(SETTLE_S)
                    quiet = not self.in_flight
        except TimeoutError:
            logger.warning("ending %d calls that took longer than %g s to finish", len(self.in_flight), grace_s)
        self.closing = True
        late = self.in_flight.copy()
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


class GrpcIngress:
    """A gRPC ingress that is open.

    Attributes:
        port: the port it listens on.
    """

    def __init__(
        self,
        port: int,
        server: grpc.aio.Server,
        servicer: InferenceServicer,
        generator: GrpcBackend,
        health: health_aio.HealthServicer,
        readiness: asyncio.Task[None],
    ) -> None:
        self.port = port
        self._generator = generator
        self._server = server
        self._servicer = servicer
        self._health = health
        self._readiness = readiness

    async def look(self) -> None:
        """Have the health service say what is true now, and not only after its next look."""
        await _report_readiness(self._generator, self._health)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait up to ``grace_s`` seconds for those in flight, then close. Never raises."""
        self._readiness.cancel()
        await asyncio.gather(self._readiness, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        # Closes the listener and tells clients to go elsewhere. It is the drain that keeps the grace, by its own
        # count: the server's would be held to its end by any client that watches the health.
        closing = asyncio.create_task(self._server.stop(grace_s + 60))
        await self._servicer.drain(grace_s)
        await self._server.stop(None)
        await closing


async def serve_grpc(
    generator: GrpcBackend,
    settings: Grpc,
    *,
    max_members: int = MAX_MEMBERS,
    guard: Guard | None = None,
    certificate: Certificate | None = None,
    reuse_port: bool = False,
    ready_poll_s: float = 0.2,
) -> GrpcIngress:
    """Open the gRPC ingress in the running event loop.

    Args:
        guard: knows who may call; None: whoever comes.
        certificate: for TLS; None is plain text.
        reuse_port: let other processes listen on the same port; the kernel spreads connections over them.
        ready_poll_s: seconds between two looks at ``generator.ready()`` for the health service.

    Raises:
        SettingsError: the port can't be opened.
    """
    servicer = InferenceServicer(generator, settings.stalled_client_timeout_s)
    health = health_aio.HealthServicer()
    server = grpc.aio.server(
        interceptors=[
            *([GuardCalls(guard)] if guard is not None else []),
            RefuseMalformed(max_members, settings.stalled_client_timeout_s),
        ],
        options=_options(settings, reuse_port),
        maximum_concurrent_rpcs=settings.max_calls,
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    add_HealthServicer_to_server(health, server)
    enable_reflection((SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server)
    port = _bind(server, settings, reuse_port, certificate)
    # The first caller must find the truth, so look once before the ingress opens.
    await _report_readiness(generator, health)
    await server.start()
    readiness = asyncio.create_task(_keep_reporting_readiness(generator, health, ready_poll_s))
    return GrpcIngress(port, server, servicer, generator, health, readiness)


def _options(settings: Grpc, reuse_port: bool) -> list[tuple[str, int]]:
    max_bytes = settings.max_message_mib * 2**20
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
        ("grpc.so_reuseport", int(reuse_port)),
        # Find clients that went without a word, so that their requests are aborted: those that have nothing on its way
        # after both times, and by the kernel's own TCP_USER_TIMEOUT the others after the second.
        ("grpc.keepalive_time_ms", int(settings.stalled_client_timeout_s * 1000 * 2 / 3)),
        ("grpc.keepalive_timeout_ms", int(settings.stalled_client_timeout_s * 1000 / 3)),
        # And let clients find a dead server, without being cut off for pinging too often.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PINGS_AT_LEAST_MS),
        # One that is over the bound is closed at once, and its client told UNAVAILABLE. A quarter of the file
        # descriptors: half are HTTP's, and the rest of the process needs some.
        (
            "grpc.max_allowed_incoming_connections",
            min(settings.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4),
        ),
        # Those that say nothing take up places among them.
        ("grpc.server_handshake_timeout_ms", int(min(settings.stalled_client_timeout_s, HANDSHAKE_S) * 1000)),
    ]


def _bind(server: grpc.aio.Server, settings: Grpc, reuse_port: bool, certificate: Certificate | None) -> int:
    where = f"{settings.port} on {settings.host}"
    if not reuse_port:
        # Asks the socket layer first, because gRPC says only that it failed, and not why.
        try:
            family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise SettingsError(f"grpc.port: {where} can't be opened: {error.strerror or error}") from None
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    listen = f"{host}:{settings.port}"
    try:
        if certificate is not None:
            return int(server.add_secure_port(listen, certificate.grpc_credentials()))
        return int(server.add_insecure_port(listen))
    except RuntimeError as error:
        raise SettingsError(f"grpc.port: {where} can't be opened: {error}") from None


async def _keep_reporting_readiness(generator: GrpcBackend, health: health_aio.HealthServicer, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await _report_readiness(generator, health)


async def _report_readiness(generator: GrpcBackend, health: health_aio.HealthServicer) -> None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            ready = await generator.ready()
    except (HyclusterError, TimeoutError) as error:
        logger.debug("not ready: %r", error)
        ready = False
    except Exception:
        logger.exception("can't tell whether a request would succeed")
        ready = False
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in ("", SERVICE):
        await health.set(service, status)
