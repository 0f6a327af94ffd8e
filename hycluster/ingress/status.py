"""The errors of the gRPC ingress as gRPC's rich status (``google.rpc.Status``), both ways.

The ingress and the client share it, so that the two can't drift apart. What it says is what :mod:`hycluster.errors`
knows of each error, as for HTTP. docs/errors.md tells callers how to read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from hycluster.errors import HyclusterError, InvalidInput, QuotaExhausted, RateLimited, kind_name

DOMAIN = "hycluster"
# In the metadata at the end of a call that failed: the name of the ingress' error.
ERROR_KEY = "hycluster-error"
RETRY_AFTER_KEY = "retry-after-s"

# A message travels twice, in a header of its own and in the status, and peers refuse headers over 8 KiB in all.
MAX_HEADERS_BYTES = 7000
MAX_MESSAGE_BYTES = 2000
MAX_DETAIL_BYTES = 300

# How an error's message names the fields that it is about.
_FIELD = r"[a-z_]\w*(?:\[\d+\]|\.\w+)*"
_NAMED = re.compile(rf"({_FIELD}(?:, {_FIELD})*): (.+)", re.DOTALL)


async def abort(
    context: Any, error: HyclusterError, request: Message | None = None, trailing: Sequence[tuple[str, str]] = ()
) -> None:
    """End a call with what the error knows. Raises, always.

    Args:
        request: what was asked; fields of it that the error is about are named as such.
        trailing: metadata that the call ends with whatever becomes of it.
    """
    # Tells what an ingress says from what gRPC says in its place when the connection breaks: the code is the same.
    metadata: list[tuple[str, str | bytes]] = [*trailing, (ERROR_KEY, kind_name(error))]
    if error.retry_after_s is not None:
        metadata += [
            (RETRY_AFTER_KEY, f"{error.retry_after_s:g}"),
            # What a gRPC client with a retry policy obeys by itself.
            ("grpc-retry-pushback-ms", str(math.ceil(error.retry_after_s * 1000))),
        ]
    status = rpc_status.to_status(rich_status(error, request))
    await context.abort(status.code, status.details, (*metadata, *status.trailing_metadata))


def rich_status(error: HyclusterError, request: Message | None = None) -> Status:
    """The error as a status with its details; its message is shortened to what headers hold."""
    status = Status(code=grpc.StatusCode[error.grpc_status].value[0])
    details: list[Message] = [_error_info(error)]
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    if isinstance(error, RateLimited | QuotaExhausted):
        violation = QuotaFailure.Violation(
            subject=error.metadata.get("of", ""), description=_cut(error.message, MAX_DETAIL_BYTES)
        )
        details.append(QuotaFailure(violations=[violation]))
    if isinstance(error, InvalidInput) and request is not None:
        violations = list(_violations(error.message, request))
        details += [BadRequest(field_violations=violations)] if violations else []
    for detail in details:
        status.details.append(_packed(detail))
    room = MAX_MESSAGE_BYTES
    status.message = _cut(error.message, room)
    while _headers_bytes(status) > MAX_HEADERS_BYTES:
        room = room * 9 // 10
        status.message = _cut(error.message, room)
    return status


@dataclass(frozen=True, slots=True)
class StatusDetails:
    """What the details of a failed call say; None and empty where they say nothing."""

    reason: str | None = None
    metadata: dict[str, str] | None = None
    retry_after_s: float | None = None


def told(failure: Any) -> StatusDetails:
    """What a failed call's status says, be the call of ``grpc`` or of ``grpc.aio``.

    A server that sends no details, a proxy that changed or broke them, and details of others' domains say nothing.
    """
    try:
        status = rpc_status.from_call(failure)
    except (ValueError, DecodeError):
        status = None
    info, retry = ErrorInfo(), RetryInfo()
    for detail in status.details if status is not None else ():
        try:
            detail.Unpack(info) or detail.Unpack(retry)
        except DecodeError:
            continue
    ours = info.domain == DOMAIN
    return StatusDetails(
        reason=info.reason if ours else None,
        metadata=dict(info.metadata) if ours else None,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def _error_info(error: HyclusterError) -> ErrorInfo:
    # The names that HTTP's answer has for it too, for who passes an error on by HTTP.
    metadata = {"http_status": str(error.http_status), "http_type": error.openai_type}
    metadata |= {name: _cut(value, MAX_DETAIL_BYTES) for name, value in error.metadata.items()}
    return ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)


def _violations(message: str, request: Message) -> Iterator[BadRequest.FieldViolation]:
    if (named := _NAMED.fullmatch(message)) is None:
        return
    for name in named[1].split(", "):
        if (path := _path(name, request)) is not None:
            yield BadRequest.FieldViolation(field=path, description=_cut(named[2], MAX_DETAIL_BYTES))


def _path(name: str, request: Message) -> str | None:
    """A field as the message has it; None if it has no such field."""
    head, rest = re.match(r"(\w+)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]  # it begins with a letter
    fields = request.DESCRIPTOR.fields_by_name
    field = fields.get(head)
    if field is None:
        # Who checks a request's sampling may know only its fields.
        sampling = fields.get("sampling")
        known = sampling is not None and sampling.message_type and head in sampling.message_type.fields_by_name
        return f"sampling.{name}" if known else None
    # A list that may be left out is a message with nothing but the list.
    kind = field.message_type
    wrapped = rest.startswith("[") and not field.is_repeated
    inner = f".{kind.fields[0].name}" if wrapped and kind is not None else ""
    # OpenAI has a message's pieces in its content.
    return f"{head}{inner}{rest}".replace("].content[", "].parts[")


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _cut(text: str, most_bytes: int) -> str:
    return text.encode("utf-8", "replace")[:most_bytes].decode("utf-8", "ignore")


def _headers_bytes(status: Status) -> int:
    # gRPC percent-encodes the one and writes the other in base 64.
    percent = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode())
    binary: bytes = status.SerializeToString()
    return percent + len(binary) * 4 // 3
