"""What is admitted, which replica it goes to, and by which sockets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hycluster.settings.base import Port, Strict


class Admission(Strict):
    """When a door sheds load, per gateway and model: two doors admit twice as much. None is no limit.

    Attributes:
        max_requests: sequences in flight (``n`` counts as n).
        max_outstanding_tokens: prompt tokens not yet prefilled plus output tokens still allowed.
        max_retry_after_s: longest time that a caller that was shed is told to wait.
        max_grammar_kib: most of a JSON schema, regex, grammar or list of choices that an output must follow.
    """

    max_requests: int | None = Field(default=1024, ge=1)
    max_outstanding_tokens: int | None = Field(default=None, ge=1)
    max_retry_after_s: float = Field(default=60, ge=1)
    max_grammar_kib: int = Field(default=64, ge=1)


class Router(Strict):
    """Which replica a request goes to; see ``hycluster/gateway/router.py`` for the policies.

    Attributes:
        session_slack_tokens: requests of one session go to one replica, which has the earlier turns in its KV cache,
            as long as that one has at most so many tokens more outstanding than the least loaded. None: sessions
            are of no account.
        failover: a request whose replica was lost, or drained away, goes on elsewhere; else it ends, once it has begun.
        failover_wait_s: how long such a request waits for a place on another replica.
    """

    policy: Literal["least_outstanding_tokens", "power_of_two"] = "least_outstanding_tokens"
    session_slack_tokens: int | None = Field(default=8192, ge=0)
    failover: bool = True
    failover_wait_s: float = Field(default=120, ge=0)


class DataPlane(Strict):
    """Where replicas listen for gateways.

    Attributes:
        host: address to bind; None is the address by which Ray knows the node.
        port_min, port_max: range to bind in; both 0 is any free port.
        lost_after_s: a peer from whose machine nothing comes for so long is lost, and its requests go on elsewhere. How
            busy a peer is does not matter: its sockets answer by themselves.
    """

    host: str | None = None
    port_min: Port = 0
    port_max: Port = 0
    lost_after_s: float = Field(default=6, ge=1, le=60)

    @model_validator(mode="after")
    def _range(self) -> DataPlane:
        if self.port_max < self.port_min:
            raise ValueError(f"port_max: {self.port_max} is below port_min ({self.port_min})")
        return self
