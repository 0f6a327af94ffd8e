"""One tree of errors; each knows its HTTP status, its gRPC status and reason, and its exit code.

Raise these with one clear line that names the field, the value and what is allowed. The ingress processes
and the command line translate them by the attributes below and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar


def shown(value: object, limit: int = 80) -> str:
    """How a value is echoed in an error: as Python writes it, cut to ``limit`` characters.

    Not for paths: a path that is cut says nothing of what it names.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class HyclusterError(Exception):
    """Base of everything hycluster raises on purpose.

    Attributes:
        http_status: status of an HTTP answer.
        openai_type: the ``error.type`` of an answer in OpenAI's form.
        openai_code: its ``error.code``, by which OpenAI's clients know it; None is the status.
        grpc_status: name of a member of ``grpc.StatusCode``.
        reason: what callers tell errors of one status apart by; ``ErrorInfo.reason`` by gRPC. It stays, whatever
            becomes of the class' name.
        exit_code: what the command line exits with.
        retry_after_s: seconds after which a retry makes sense, if that is known.
        metadata: what else the message is about, by name; ``ErrorInfo.metadata`` by gRPC.
    """

    # Of the class: errors that are vLLM's as well are made by vLLM's constructor.
    metadata: Mapping[str, str] = MappingProxyType({})
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "InternalServerError"
    openai_code: ClassVar[str | None] = None
    grpc_status: ClassVar[str] = "INTERNAL"
    # Not a ClassVar: the client has an error say what a newer server gave as its reason.
    reason: str = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return remade, (type(self), self.message), self.__dict__


Error = TypeVar("Error", bound=HyclusterError)


def remade(kind: type[Error], message: str) -> Error:
    """An error out of its message, past its own constructor: that one may compose the message anew."""
    error = kind.__new__(kind)
    HyclusterError.__init__(error, message)
    return error


class InvalidInput(HyclusterError, ValueError):
    """The caller's input is wrong; sending it again unchanged is of no use."""

    http_status = 400
    openai_type = "BadRequestError"
    grpc_status = "INVALID_ARGUMENT"
    reason = "INVALID_INPUT"
    exit_code = 2


class SettingsError(InvalidInput):
    """A settings or job file, or a command-line option, is wrong."""

    reason = "SETTINGS"


class PromptTooLong(InvalidInput):
    """The prompt leaves no room for an output in the model's context."""

    reason = "PROMPT_TOO_LONG"


class TooManyMembers(InvalidInput):
    """There is more in a request than is taken apart for one; see :func:`too_many_members`."""

    http_status = 413
    reason = "TOO_MANY_MEMBERS"


class Unauthenticated(HyclusterError):
    """No credentials, or wrong ones."""

    http_status = 401
    openai_type = "AuthenticationError"
    openai_code = "invalid_api_key"
    grpc_status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"
    exit_code = 2


class PermissionDenied(HyclusterError):
    """The credentials are right, and not enough for this."""

    http_status = 403
    openai_type = "PermissionDeniedError"
    openai_code = "insufficient_permissions"
    grpc_status = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"
    exit_code = 2


class UnknownModel(HyclusterError):
    """No model of that name is served here."""

    http_status = 404
    openai_type = "NotFoundError"
    openai_code = "model_not_found"
    grpc_status = "NOT_FOUND"
    reason = "UNKNOWN_MODEL"
    exit_code = 2

    def __init__(self, model: str, served: list[str]) -> None:
        # Comparing takes the longer, the longer it is, and callers write what they like.
        near = difflib.get_close_matches(model[:80], served, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        super().__init__(f"model: {shown(model)} is not served here{meant}; served are {', '.join(map(repr, served))}")
        self.model, self.served = model, served
        self.metadata = {"model": model, "served": ", ".join(served)}


class NotFound(HyclusterError):
    """Nothing of that id is here."""

    http_status = 404
    openai_type = "NotFoundError"
    grpc_status = "NOT_FOUND"
    reason = "NOT_FOUND"


class Overloaded(HyclusterError):
    """Shed before any work was done; ``retry_after_s`` says when to come back."""

    http_status = 429
    openai_type = "RateLimitError"
    grpc_status = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class RateLimited(Overloaded):
    """A limit of the caller's own is reached, whose kind (``limit``) and owner (``of``) ``metadata`` names;
    ``retry_after_s`` says when to come back."""

    openai_code = "rate_limit_exceeded"
    reason = "RATE_LIMITED"


class QuotaExhausted(HyclusterError):
    """The caller's tokens of the day or money of the month are used up; coming back soon is of no use. ``metadata`` as
    of :class:`RateLimited`."""

    http_status = 429
    openai_type = "insufficient_quota"
    openai_code = "insufficient_quota"
    grpc_status = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXHAUSTED"


class Unavailable(HyclusterError):
    """No replica can serve this now, or the one that did was lost; a retry may succeed."""

    http_status = 503
    openai_type = "ServiceUnavailableError"
    grpc_status = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class ReplicaLost(Unavailable):
    """A replica died while it had this request, and the request was not sent to another one."""

    reason = "REPLICA_LOST"


class KillsReplicas(HyclusterError):
    """Replica after replica died while it had this request; sending it again would cost more of them."""

    http_status = 422
    openai_type = "UnprocessableEntityError"
    grpc_status = "FAILED_PRECONDITION"
    reason = "KILLS_REPLICAS"


class RequestFailed(Unavailable):
    """The engine ended this one request with an error; it goes on with others."""

    reason = "REQUEST_FAILED"


class DeadlineExceeded(HyclusterError):
    """The caller's deadline passed before the work was done."""

    http_status = 504
    openai_type = "TimeoutError"
    grpc_status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class ClusterLost(HyclusterError):
    """Ray's GCS or raylet died under ``hycluster serve``; a supervisor starts it anew."""

    reason = "CLUSTER_LOST"
    exit_code = 4


class EngineStartFailed(HyclusterError):
    """An engine could not start: too little memory, more devices than there are, a bad model folder."""

    reason = "ENGINE_START_FAILED"


class JobFailed(HyclusterError):
    """A batch job ended without a committed output; the same command resumes it."""

    reason = "JOB_FAILED"


class TooManyQuarantined(HyclusterError):
    """More rows were quarantined than the job allows."""

    reason = "TOO_MANY_QUARANTINED"
    exit_code = 3


def too_many_members(where: str, most: float) -> TooManyMembers:
    """The same error at every entrance.

    Args:
        where: what of a request: its body, its line, its message.
    """
    return TooManyMembers(
        f"{where}: has more than {most} members (objects, arrays and what is in objects; in a message fields and"
        f" elements); at most {most} are allowed"
    )


BY_REASON: dict[str, type[HyclusterError]] = {
    kind.reason: kind for kind in tuple(vars().values()) if isinstance(kind, type) and issubclass(kind, HyclusterError)
}


def kind_of(error: HyclusterError) -> type[HyclusterError]:
    """Which of this module's errors it is: what callers know it by."""
    return next(kind for kind in type(error).__mro__ if kind in BY_REASON.values())


def kind_name(error: BaseException) -> str:
    """An error's name wherever one is written down: the same whichever form of it was raised."""
    return (kind_of(error) if isinstance(error, HyclusterError) else type(error)).__name__


START_FAILURE = "hycluster: "


def start_failure(error: HyclusterError) -> RuntimeError:
    """Why an engine or an ingress process can't start, in a form that comes through Ray's reports as one line.

    Ray turns an actor's error into text; :func:`reported` finds this line in it again.
    """
    return RuntimeError(f"{START_FAILURE}{type(error).__name__}: {error.message}")


_REASON = re.compile(rf"RuntimeError: {START_FAILURE}(\w+): (.+)")


def reported(report: str) -> HyclusterError | None:
    """The error that an engine or an ingress process ended with, out of what Ray says about it; None if it says no such
    thing."""
    found = _REASON.search(report)
    if found is None:
        return None
    kind = SettingsError if found[1] == SettingsError.__name__ else EngineStartFailed
    return kind(found[2].strip())


def why_not_started(report: str) -> HyclusterError:
    """Why an engine or an ingress process did not start, out of what Ray says about it, whatever that is."""
    return reported(report) or EngineStartFailed(one_line(report))


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """A text of many lines in one."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
