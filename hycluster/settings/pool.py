"""What a replica reserves, how many there are, when there are more or fewer, when one is given up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hycluster.settings.base import LabelKey, LabelValue, Strict


class Hardware(Strict):
    """Resources of one replica.

    Attributes:
        accelerator: GPU type by Ray's name (``H20``, ``H100``, ...); None runs on CPU.
        cpus: Ray CPUs for each data-parallel rank. On CPU: for each tensor, pipeline and data rank; also its threads.
        memory_gib: host memory to reserve for the replica, without the KV cache; None reserves none.
        kv_cache_gib: KV cache of each rank on CPU. On a GPU vLLM sizes it (``gpu_memory_utilization``).
        kv_offload_gib: host memory that keeps KV blocks after the KV cache has dropped them, so that a prompt seen
            before is not computed again; not counted in ``memory_gib``. None keeps none.
        placement: how Ray lays a replica of several reservations (a data-parallel rank each, or a GPU each where a
            rank spans nodes) over nodes: few nodes or many, if that can be (``pack``, ``spread``) or else not at
            all (``strict_pack``: one node; ``strict_spread``: a node each).
        gpus_per_node: GPUs of a node; a rank that needs more is spread over several nodes.
        node_selector: on Kubernetes, labels of the nodes that its pods go to; by default those by which NVIDIA's
            operator tells the accelerator, where it has one name only.
        resources: what each of a replica's reservations takes besides, by Ray's names of custom resources: only nodes
            that have them hold it. ``hycluster k8s render`` sets it where several models have pods of their own.
    """

    accelerator: str | None = None
    cpus: float = Field(default=1, gt=0)
    memory_gib: float | None = Field(default=None, gt=0)
    kv_cache_gib: float = Field(default=1, gt=0)
    kv_offload_gib: float | None = Field(default=None, gt=0)
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    gpus_per_node: int = Field(default=8, ge=1)
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class Replicas(Strict):
    """Number of replicas in a model's pool; a data-parallel group counts as one.

    Attributes:
        min: fewest replicas; 0 scales to zero while there are no requests.
        max: most replicas; above ``min`` the pool is autoscaled (``autoscaling``). Default: ``min``.
        initial: replicas at the start. Default: ``min``.
    """

    min: int = Field(default=1, ge=0)
    max: int | None = Field(default=None, ge=1)
    initial: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.min == 0 and self.max is None:
            raise ValueError("min: 0 is not allowed without max; set max to the most replicas that there may be")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max: {self.max} is below min ({self.min})")
        if self.initial is not None and not self.min <= self.initial <= self.most:
            raise ValueError(f"initial: {self.initial} is not between min ({self.min}) and max ({self.most})")
        return self

    @property
    def count(self) -> int:
        """How many there are at first; of a pool of fixed size, always."""
        return self.min if self.initial is None else self.initial

    @property
    def most(self) -> int:
        return self.min if self.max is None else self.max

    @property
    def vary(self) -> bool:
        return self.most > self.min


class Autoscaling(Strict):
    """When a pool grows and shrinks, where ``replicas.max`` is above ``replicas.min``; see ``docs/autoscaling.md``.

    Attributes:
        target_outstanding_tokens: tokens left to prefill or decode for each replica; more of them add replicas.
        expected_output_tokens: most output tokens of a request that count as outstanding, if it allows more.
        target_kv_usage: fraction of a replica's KV cache in use above which replicas are added.
        target_batch_usage: running and queued sequences of a replica, as a fraction of ``max_num_seqs``, above which
            replicas are added.
        scale_up_after_s: how long the load must be above target before replicas are added; from zero at once.
        scale_down_after_s: how long fewer replicas must have been enough before some are removed; at least as long as
            a cold start takes.
        scale_to_zero_after_s: with ``replicas.min: 0``, time without requests after which the last replica is removed.
        cold_start: with ``replicas.min: 0``, whether a request that finds no replica waits for one, or is refused (503,
            UNAVAILABLE) with a time to retry after. Either starts a replica.
        max_cold_start_wait_s: longest time that such a request waits.
    """

    target_outstanding_tokens: int = Field(default=65536, ge=1)
    expected_output_tokens: int = Field(default=512, ge=1)
    target_kv_usage: float = Field(default=0.8, gt=0, le=1)
    target_batch_usage: float = Field(default=0.8, gt=0, le=1)
    scale_up_after_s: float = Field(default=2, ge=0)
    scale_down_after_s: float = Field(default=300, ge=0)
    scale_to_zero_after_s: float = Field(default=600, ge=0)
    cold_start: Literal["wait", "refuse"] = "wait"
    max_cold_start_wait_s: float = Field(default=600, gt=0)


class Health(Strict):
    """When a replica counts as unhealthy and is replaced; see ``docs/health.md``.

    Attributes:
        hung_after_s: an engine that has work and finishes no step for this long counts as hung. Must be above its
            longest regular step: ``max_num_batched_tokens`` of prefill on the slowest node, and compilation.
        probe_after_s: an engine that has been idle for this long is probed: asked for one token.
        stopped_after_s: a replica's process that has been stopped (SIGSTOP) for this long is killed.
    """

    hung_after_s: float = Field(default=120, gt=0)
    probe_after_s: float = Field(default=30, gt=0)
    stopped_after_s: float = Field(default=1, gt=0)
