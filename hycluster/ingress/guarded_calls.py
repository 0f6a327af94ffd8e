"""The gRPC ingress's door: who calls is known before a call's message is looked at."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from hycluster.auth.caller import Caller, calling
from hycluster.auth.certificate import PeerCertificate, read_certificate
from hycluster.auth.guard import Guard, bearer
from hycluster.errors import HyclusterError
from hycluster.ingress.status import abort
from hycluster.observe.ingresses import grpc_began, grpc_ended

# For probes, which have no key.
OPEN = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"

Behaviour = Callable[[Any, Any], Awaitable[Any]]


class GuardCalls(grpc.aio.ServerInterceptor):
    """Lets in who may, and says for all that is done within who that is. Comes before :class:`RefuseMalformed`, which
    makes every behaviour a coroutine."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called once a call, before its request is there."""
        handler: Any = await continuation(handler_call_details)
        details: Any = handler_call_details
        if handler is None or details.method.startswith(OPEN):
            return handler
        credential = _credential(details.invocation_metadata)
        if self._guard.certificates is not None and self._guard.certificates.required:
            # Which certificate the connection has shown is known to the call alone.
            return _changed(handler, lambda behaviour: _identified(self._guard, credential, details.method, behaviour))
        try:
            caller = await self._guard.caller(credential)
        except HyclusterError as error:
            refuse = _refusing(error, details.method)
            return _changed(handler, lambda _: refuse)._replace(request_deserializer=None)
        return _changed(handler, lambda behaviour: _calling(caller, behaviour))


def _credential(metadata: Any) -> str | None:
    said = next((value for name, value in metadata or () if name == "authorization"), "")
    return bearer(said) if isinstance(said, str) else None


def _changed(handler: Any, change: Callable[[Behaviour], Behaviour]) -> Any:
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    found = {kind: getattr(handler, kind) for kind in kinds}
    return handler._replace(**{kind: change(behaviour) for kind, behaviour in found.items() if behaviour is not None})


def _refusing(error: HyclusterError, path: str) -> Behaviour:
    service, _, method = path.removeprefix("/").partition("/")

    async def refuse(_request: Any, context: Any) -> None:
        grpc_began()
        # As the others are, which the servicer counts.
        grpc_ended("", service, method, error.grpc_status, 0.0)
        await abort(context, error)

    return refuse


def _identified(guard: Guard, credential: str | None, path: str, behaviour: Behaviour) -> Behaviour:
    async def called(request: Any, context: Any) -> Any:
        try:
            caller = await guard.caller(credential, _certificate(context))
        except HyclusterError as error:
            return await _refusing(error, path)(request, context)
        return await _calling(caller, behaviour)(request, context)

    return called


def _certificate(context: Any) -> PeerCertificate | None:
    shown = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
    return None if shown is None else read_certificate(bytes(shown))


def _calling(caller: Caller, behaviour: Behaviour) -> Behaviour:
    async def called(request: Any, context: Any) -> Any:
        with calling(caller):
            return await behaviour(request, context)

    return called
