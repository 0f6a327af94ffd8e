"""Ingress processes that are open before there is anything behind them: they say so, and what is still missing.

HTTP answers 503 and gRPC UNAVAILABLE, but for a model that is not going to be served: nobody is to wait for that. Both
healths are asked as when they are open. The HTTP socket is handed
over to the ingress that serves; the gRPC ingress stays and gets its generator. Imports no vLLM, so it is there
within a second or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Unpack

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hycluster.adapters import named_by_caller
from hycluster.auth.caller import usable
from hycluster.auth.guard import Guard
from hycluster.core import Generation, GenerationRequest, ModelCard, PromptFields
from hycluster.errors import UnknownModel
from hycluster.ingress import health
from hycluster.ingress.body import BodyLimit
from hycluster.ingress.connection import protocol
from hycluster.ingress.dispatch import named_by
from hycluster.ingress.errors import answer_error
from hycluster.ingress.forms import in_form
from hycluster.ingress.grpc import GrpcBackend, GrpcIngress, serve_grpc
from hycluster.ingress.guarded import Guarded
from hycluster.ingress.ports import bind, check_port
from hycluster.ingress.tls import Certificate
from hycluster.settings.settings import Settings

# Of all models and adapters that are served, or are to be; None while that is not known.
Names = Callable[[], Awaitable[Sequence[str] | None]]
JSON = b"application/json"


async def _unknown(model: str, names: Names) -> UnknownModel | None:
    """The error for a name that no model is going to have."""
    known = await names() if model else None
    served = named_by_caller(known or ())
    return None if known is None or model in served else UnknownModel(model, usable(served))


class WithoutUnknown:
    """ASGI middleware: refuses what names a model that is not going to be served."""

    def __init__(self, app: ASGIApp, names: Names) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["path"] != health.PATH:
            # A file that is sent here is not read to be thrown away.
            is_json = dict(scope["headers"]).get(b"content-type", b"").startswith(JSON)
            name, receive = await named_by(scope, receive, in_body=is_json)
            if (error := await _unknown(name, self._names)) is not None:
                app = await answer_error(None, error)
        await app(scope, receive, send)


class WaitingGenerator:
    """Stands before a generator that is still to come; refuses everything until :meth:`open`."""

    def __init__(self, pools: health.Pools, names: Names) -> None:
        self._pools = pools
        self._names = names
        self._generator: GrpcBackend | None = None

    def open(self, generator: GrpcBackend) -> None:
        self._generator = generator

    async def _open(self, model: str = "") -> GrpcBackend:
        if self._generator is None:
            raise await _unknown(model, self._names) or health.starting(await self._pools())
        return self._generator

    async def models(self) -> list[ModelCard]:
        return await (await self._open()).models()

    def model_of(self, name: str) -> str | None:
        return self._generator.model_of(name) if self._generator is not None else None

    async def stream(
        self, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[Generation, None]:
        async with aclosing((await self._open(request.model)).stream(request, deadline_s=deadline_s)) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(self, request: GenerationRequest, *, deadline_s: float | None = None) -> Generation:
        return await (await self._open(request.model)).generate(request, deadline_s=deadline_s)

    async def tokenize(self, model: str, **asked: Unpack[PromptFields]) -> list[int]:
        return await (await self._open(model)).tokenize(model, **asked)

    async def count_tokens(self, model: str, texts: Sequence[str]) -> list[int]:
        return await (await self._open(model)).count_tokens(model, texts)

    async def ready(self) -> bool:
        return self._generator is not None and await self._generator.ready()


class StartingIngress:
    """Both ingresses while the service starts.

    Attributes:
        grpc: the gRPC ingress.
        http_port: the port that the HTTP ingress listens on.
    """

    def __init__(
        self, grpc: GrpcIngress, generator: WaitingGenerator, sock: socket.socket, server: uvicorn.Server
    ) -> None:
        self.grpc = grpc
        self.http_port: int = sock.getsockname()[1]
        self._generator = generator
        self._sock = sock
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[sock.dup()]))

    async def hand_over(self, generator: GrpcBackend) -> socket.socket:
        """Let gRPC callers through, answer no more over HTTP; returns the socket that HTTP callers wait at."""
        await self._end_http()
        self._generator.open(generator)
        await self.grpc.look()
        return self._sock

    async def _end_http(self) -> None:
        self._server.should_exit = True
        await self._serving

    async def close(self) -> None:
        """Leave nothing open, whoever has it."""
        await self._end_http()
        self._sock.close()
        await self.grpc.stop(0)


@contextlib.asynccontextmanager
async def starting_ingress(
    settings: Settings,
    pools: health.Pools,
    names: Names,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    guard: Guard | None = None,
    certificate: Certificate | None = None,
) -> AsyncIterator[StartingIngress]:
    """Open both ingresses with nothing behind them.

    Args:
        around: puts routes beside ``/health`` that need no model.
        guard: knows who may call; None: whoever comes.
        certificate: for TLS; None is plain text.

    Raises:
        SettingsError: a port is in use.
    """
    check_port(settings.http.host, settings.http.port, "http.port")
    check_port(settings.grpc.host, settings.grpc.port, "grpc.port")
    # A successor is to listen beside them one day.
    sock = bind(settings.http.host, settings.http.port, "http.port", reuse_port=True)
    try:
        generator = WaitingGenerator(pools, names)
        grpc = await serve_grpc(
            generator,
            settings.grpc,
            max_members=settings.admission.max_members,
            guard=guard,
            certificate=certificate,
            reuse_port=True,
        )
    except BaseException:
        sock.close()
        raise
    app = BodyLimit(
        WithoutUnknown(health.WithHealth(None, pools, terse=guard is not None), names),
        settings.http.max_body_mib << 20,
        max_total_bytes=settings.http.max_bodies_mib << 20,
        stall_s=settings.http.stalled_client_timeout_s,
    )
    known = around(app) if guard is None else Guarded(around(app), guard)
    server = uvicorn.Server(
        uvicorn.Config(
            in_form(known, settings.http.allowed_origins),
            # What comes next on a connection is for the ingress that serves.
            http=protocol(settings.http, keep_alive=False),
            ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )
    ingresses = StartingIngress(grpc, generator, sock, server)
    try:
        yield ingresses
    finally:
        await ingresses.close()
