"""Requests to the gRPC ingress that are no message of their kind, too much of one, or none: the caller's fault, and
told so.

By itself grpc.aio answers the first with INTERNAL and writes a stack trace into the log, and waits for the last for
ever: a few connections took all places that calls have.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hycluster.errors import DeadlineExceeded, HyclusterError, InvalidInput, too_many_members
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
        stall_s: how long a call's request, or its first one, may take to come.
    """

    def __init__(self, max_members: int, stall_s: float) -> None:
        self._max_members = max_members
        self._stall_s = stall_s

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

        guard = _Guard(self._stall_s)
        # All of them as streams of requests, which are read here: grpc.aio waits for a single one without end.
        changes: dict[str, Any] = {
            "request_deserializer": decode, "request_streaming": True, "unary_unary": None, "unary_stream": None,
        }  # fmt: skip
        for kind, guarded, becomes in (
            ("unary_unary", guard.one, "stream_unary"),
            ("unary_stream", guard.one, "stream_stream"),
            ("stream_unary", guard.each, "stream_unary"),
            ("stream_stream", guard.each, "stream_stream"),
        ):
            if (behaviour := getattr(handler, kind)) is not None:
                changes[becomes] = guarded(behaviour)
        return handler._replace(**changes)


class _Guard:
    """Stands before what answers a method."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._ending: set[asyncio.Task[None]] = set()

    # grpc.aio asks a function whether it yields; these stand before those that do and those that don't.
    def one(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def guarded(_: object, context: Any) -> Any:
            request = await self._first(context)
            if request is grpc.aio.EOF:
                await abort(context, InvalidInput("request: is missing; this method takes one"))
            return await _answered(behaviour(request, context), context)

        return guarded

    def each(self, behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def checked(context: Any) -> AsyncIterator[Any]:
            request = await self._first(context)
            while request is not grpc.aio.EOF:
                yield request
                request = await _checked(await context.read(), context)

        async def guarded(_: object, context: Any) -> Any:
            return await _answered(behaviour(checked(context), context), context)

        return guarded

    async def _first(self, context: Any) -> Any:
        # What is read is within gRPC's core and not to be cancelled: it ends with the call, by the error of its end.
        late = asyncio.get_running_loop().call_later(self._stall_s, self._end, context)
        try:
            request = await context.read()
        finally:
            late.cancel()
        return await _checked(request, context)

    def _end(self, context: Any) -> None:
        why = DeadlineExceeded(f"request: did not come within {self._stall_s:g} s")
        self._ending.add(ending := asyncio.ensure_future(abort(context, why)))
        ending.add_done_callback(self._ended)

    def _ended(self, ending: asyncio.Task[None]) -> None:
        self._ending.discard(ending)
        # It raises, always.
        ending.cancelled() or ending.exception()


async def _checked(request: Any, context: Any) -> Any:
    if isinstance(request, _Refused):
        await abort(context, request.why)
    return request


async def _answered(made: Any, context: Any) -> Any:
    """What a handler made, be it one response or many."""
    if not hasattr(made, "__aiter__"):
        return await made
    async for response in made:
        await context.write(response)
    return None
