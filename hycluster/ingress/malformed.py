"""Requests to the gRPC ingress that are no message of their kind, or too much of one: the caller's fault, and told so.

By itself grpc.aio answers the first with INTERNAL and writes a stack trace into the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hycluster.errors import HyclusterError, InvalidInput, too_many_members
from hycluster.ingress.message_shape import count_members, message_kind
from hycluster.ingress.status import abort

# Generic for the type checker only.
Handler = Any


@dataclass(frozen=True, slots=True)
class _Refused:
    """Stands where the message would."""

    why: HyclusterError


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Ends a call whose request can't be decoded with INVALID_ARGUMENT; for all methods of all services.

    Args:
        max_members: of a request (:func:`count_members`).
    """

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members

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

        asked_with = message_kind(handler_call_details.method)

        def decode(request: bytes) -> Any:
            most = self._max_members
            # A member has a byte at the least.
            if asked_with is not None and len(request) > most and count_members(request, asked_with, most) > most:
                return _Refused(too_many_members("request", most))
            try:
                return handler.request_deserializer(request)
            except DecodeError:
                return _Refused(InvalidInput("request: is not a message of the kind that this method takes"))

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
        if isinstance(request, _Refused):
            await abort(context, request.why)
        return await _answered(behaviour(request, context), context)

    return guarded


def _each(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def checked(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, _Refused):
                await abort(context, request.why)
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
