"""Requests to the gRPC ingress that are no message of their kind: the caller's fault, and told so.

By itself grpc.aio answers them with INTERNAL and writes a stack trace into the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hycluster.errors import InvalidInput
from hycluster.ingress.status import abort

# Generic for the type checker only.
Handler = Any


class _Malformed:
    """Stands where the message would."""


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Ends a call whose request can't be decoded with INVALID_ARGUMENT; for all methods of all services."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Called once a call, before its request is there."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            # None is how gRPC says that there is no such method.
            return handler

        def decode(request: bytes) -> Any:
            try:
                return handler.request_deserializer(request)
            except DecodeError:
                return _Malformed()

        changes: dict[str, Any] = {"request_deserializer": decode}
        for kind, guard in (
            ("unary_unary", _one),
            ("unary_stream", _one),
            ("stream_unary", _each),
            ("stream_stream", _each),
        ):
            if (behaviour := getattr(handler, kind)) is not None:
                changes[kind] = guard(behaviour)
        return handler._replace(**changes)


def _one(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # grpc.aio asks a function whether it yields; this one stands before those that do and those that don't.
    async def guarded(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await _refuse(context)
        return await _answered(behaviour(request, context), context)

    return guarded


def _each(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def checked(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, _Malformed):
                await _refuse(context)
            yield request

    async def guarded(requests: AsyncIterator[Any], context: Any) -> Any:
        return await _answered(behaviour(checked(requests, context), context), context)

    return guarded


async def _answered(made: Any, context: Any) -> Any:
    """What a handler made, be it one response or many."""
    if not hasattr(made, "__aiter__"):
        return await made
    async for response in made:
        await context.write(response)
    return None


async def _refuse(context: Any) -> None:
    await abort(context, InvalidInput("request: is not a message of the kind that this method takes"))
