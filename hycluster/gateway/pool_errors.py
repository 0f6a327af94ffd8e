"""hycluster's errors as vLLM's own: what a gateway raises passes through vLLM's code with its status unchanged."""

from __future__ import annotations

from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMClientError

from hycluster.errors import InvalidInput, KillsReplicas, Overloaded, ReplicaLost, Unauthenticated, Unavailable


class PoolOverloaded(Overloaded, GracefulHTTPError):  # type: ignore[misc]  # both have an http_status, the same
    """:class:`Overloaded` in a form that vLLM's own code passes on unchanged."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus(Overloaded.http_status))
        self.retry_after_s = retry_after_s


class PoolInvalidInput(InvalidInput, VLLMClientError):
    """:class:`InvalidInput` in a form that vLLM's own code passes on unchanged."""


class PoolUnavailable(Unavailable, GracefulHTTPError):  # type: ignore[misc]  # as above
    """:class:`Unavailable` in a form that vLLM's own code passes on unchanged."""

    def __init__(self, message: str, retry_after_s: float | None = 1.0) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus(Unavailable.http_status))
        self.retry_after_s = retry_after_s


class PoolReplicaLost(ReplicaLost, PoolUnavailable):  # type: ignore[misc]  # as above
    """:class:`ReplicaLost` in a form that vLLM's own code passes on unchanged."""


class PoolKillsReplicas(KillsReplicas, GracefulHTTPError):  # type: ignore[misc]  # as above
    """:class:`KillsReplicas` in a form that vLLM's own code passes on unchanged."""

    def __init__(self, message: str) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus(KillsReplicas.http_status))
        self.retry_after_s = None


class PoolUnauthenticated(Unauthenticated, GracefulHTTPError):  # type: ignore[misc]  # as above
    """:class:`Unauthenticated` in a form that vLLM's own code passes on unchanged."""

    def __init__(self, message: str) -> None:
        GracefulHTTPError.__init__(self, message, HTTPStatus(Unauthenticated.http_status))
        self.retry_after_s = None


# By what a pool tells of a request that has been taken.
LOST = {
    InvalidInput: PoolInvalidInput,
    ReplicaLost: PoolReplicaLost,
    Unavailable: PoolUnavailable,
    KillsReplicas: PoolKillsReplicas,
    Unauthenticated: PoolUnauthenticated,
}
