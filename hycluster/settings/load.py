"""What is admitted, which replica it goes to, and by which sockets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hycluster.settings.base import Port, Strict

MAX_MEMBERS = 50_000


class Admission(Strict):
    """Limits of each gateway (one for each ingress process and model) and of each request; what is above is refused.
    None: no limit.

    Attributes:
        max_requests: sequences in flight; a request with ``n`` counts n times.
        max_outstanding_tokens: prompt tokens not yet prefilled plus output tokens that may still come.
        max_members: objects, arrays and members of objects in the JSON of a request, be it a body to a model or a line
            of a batch; fields and elements of repeated fields of a gRPC message. A chat's message has three or more.
            What it takes to read and validate goes by them, in the loop that serves all others.
        max_retry_after_s: upper bound of the ``Retry-After`` of a refusal.
        max_grammar_kib: largest JSON schema, regex, grammar or list of choices for structured output.
        max_grammar_repeats: largest count in one of them (``minItems``, ``maxLength``, ``{n,m}``, ...).
        grammar_timeout_s: CPU time that one of them may take to be checked, in a process of its own.
        grammar_memory_mib: memory that it may take there.
    """

    max_requests: int | None = Field(default=1024, ge=1)
    max_outstanding_tokens: int | None = Field(default=None, ge=1)
    max_members: int = Field(default=MAX_MEMBERS, ge=10_000)
    max_retry_after_s: float = Field(default=60, ge=1)
    max_grammar_kib: int = Field(default=64, ge=1)
    max_grammar_repeats: int = Field(default=100_000, ge=1)
    grammar_timeout_s: float = Field(default=2, gt=0, le=60)
    grammar_memory_mib: int = Field(default=512, ge=64)


RouterPolicy = Literal[
    "least_outstanding_tokens", "power_of_two", "predicted_ttft", "prefix_hash", "longest_match", "lmetric", "dynamo"
]


class Router(Strict):
    """Which replica a request goes to; ``docs/routing.md`` has the policies.

    Attributes:
        policy: the replica where the first token is expected soonest, by its queue and by what it has of the prompt in
            its KV cache. ``least_outstanding_tokens`` and ``power_of_two`` (of two random ones the one with fewer
            requests) go by load alone, as all do where engines do not tell what they hold; the rest is for comparison.
        session_slack_tokens: requests of one session go to one replica, which has the earlier turns in its KV cache,
            unless it has more than this many tokens more outstanding than the least loaded one. None: sessions are
            ignored; so they are where a policy knows what replicas have cached.
        follow_kv_blocks: gateways know which KV blocks each replica has, for policies that go by it, which turn it on
            themselves; and for metrics of how well they know it.
        failover: migrate a request whose replica is lost or drained to another one; False ends it once it has begun.
        failover_wait_s: how long such a request waits for another replica that can take it.
    """

    policy: RouterPolicy = "predicted_ttft"
    session_slack_tokens: int | None = Field(default=8192, ge=0)
    follow_kv_blocks: bool = False
    failover: bool = True
    failover_wait_s: float = Field(default=120, ge=0)


class DataPlane(Strict):
    """Where replicas listen for gateways.

    Attributes:
        host: address to bind; None is the node's address in Ray, and loopback as long as Ray has no other machine.
        port_min, port_max: range of ports to bind; both 0 is any free port.
        lost_after_s: a peer whose machine is silent for this long counts as lost, and its requests are migrated. A busy
            peer is not silent: its sockets answer by themselves.
        encrypted: encrypt what travels between gateways and replicas, prompts and answers, by keys that the replicas
            hand out within the Ray cluster (ZMQ's CURVE). False: who can read the network can read them, and the
            password by which a replica knows its gateways; only where nobody else is on that network.
    """

    host: str | None = None
    port_min: Port = 0
    port_max: Port = 0
    lost_after_s: float = Field(default=6, ge=1, le=60)
    encrypted: bool = True

    @model_validator(mode="after")
    def _range(self) -> DataPlane:
        if self.port_max < self.port_min:
            raise ValueError(f"port_max: {self.port_max} is below port_min ({self.port_min})")
        return self
