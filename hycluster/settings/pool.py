"""What a replica reserves, how many there are, when there are more or fewer, when one is given up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hycluster.settings.base import LabelKey, LabelValue, Strict


class Hardware(Strict):
    """What one replica reserves.

    Attributes:
        accelerator: Ray's name of a GPU type (``H20``, ``H100``, ...), or None to run on CPU.
        cpus: Ray CPUs of each data-parallel rank. On CPU: of each rank, tensor and pipeline too, and its threads.
        memory_gib: memory to reserve for the replica, not counting the KV cache; None reserves none.
        kv_cache_gib: size of the KV cache on CPU, of each rank. On a GPU vLLM sizes it (``gpu_memory_utilization``).
        kv_offload_gib: host memory that keeps KV blocks after the KV cache has dropped them, so that a prompt seen
            before is not computed again; not counted in ``memory_gib``. None keeps none.
        placement: how Ray lays a replica of several reservations (a data-parallel rank each, or a GPU each where a
            rank spans nodes) over nodes: few nodes or many, if that can be (``pack``, ``spread``) or else not at
            all (``strict_pack``: one node; ``strict_spread``: a node each).
        gpus_per_node: a rank of more devices than that is spread over nodes.
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
    """How many engines a model's pool has; a data-parallel group counts as one.

    Attributes:
        min: 0 lets the pool sleep while nobody asks.
        max: above ``min``, the pool follows its load (``autoscaling``); ``min`` by default.
        initial: how many it starts with; ``min`` by default.
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
        target_outstanding_tokens: for so many tokens to prefill or decode there is to be a replica.
        expected_output_tokens: of a request that may have a longer output, no more are counted as outstanding.
        target_kv_usage: share of a replica's KV cache that may be in use.
        target_batch_usage: sequences that a replica may have, queued ones too, as a share of ``max_num_seqs``.
        scale_up_after_s: how long too few replicas are put up with; a pool that sleeps is woken at once.
        scale_down_after_s: for so long fewer replicas must have been enough. At least a cold start, in any case.
        scale_to_zero_after_s: with ``replicas.min: 0``, how long nobody must have asked until the pool sleeps.
        cold_start: with ``replicas.min: 0``, whether a request that finds no replica waits for one or is refused with
            the time after which to come back. Either wakes the pool.
        max_cold_start_wait_s: how long such a request waits at most.
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
    """When a replica is given up and replaced; see ``docs/health.md``.

    Attributes:
        hung_after_s: an engine that has work and finishes no step for so long is hung. Must be above its longest honest
            step: ``max_num_batched_tokens`` of prefill on the slowest node, and what is compiled on first use.
        probe_after_s: an engine that has had no work for so long is asked for a token.
        stopped_after_s: a replica's process that has been stopped (SIGSTOP) for so long is killed.
    """

    hung_after_s: float = Field(default=120, gt=0)
    probe_after_s: float = Field(default=30, gt=0)
    stopped_after_s: float = Field(default=1, gt=0)
