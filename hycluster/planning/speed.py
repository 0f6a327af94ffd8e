"""Bounds on speed: no engine can be faster on this hardware; how near one comes is for a benchmark to say.

A decode step reads from each GPU's memory the weights that its batch touches and the KV cache of its sequences, and
does the arithmetic. Communication, kernels below the peak and the host are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hycluster.engine.routed_weights import busiest_share, experts_touched
from hycluster.planning.architecture import Architecture, parameters
from hycluster.planning.gpus import Gpu
from hycluster.planning.precision import Precision
from hycluster.planning.shares import DeviceShare
from hycluster.settings.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Decode:
    """The bound on decoding with a batch of one replica.

    Attributes:
        batch: sequences in the batch.
        experts_touched: distinct routed experts of a layer that a step is expected to use.
        weights_bytes, kv_bytes: read in a step by the busiest GPU.
        step_s: the least time of a step.
        limit: what sets it.
    """

    batch: int
    experts_touched: float
    weights_bytes: int
    kv_bytes: int
    step_s: float
    limit: str

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def tokens_per_s_each(self) -> float:
        """Of one sequence."""
        return 1 / self.step_s


def experts_held(model: Architecture, parallel: Parallel) -> int:
    """Of a layer's experts, how many a GPU holds, whole or a part of each."""
    copies = model.experts + parallel.eplb.redundant_experts
    return -(-copies // parallel.expert_ranks) if parallel.expert else model.experts


def decode_bound(
    model: Architecture,
    parallel: Parallel,
    share: DeviceShare,
    precision: Precision,
    gpu: Gpu,
    batch: int,
    context_tokens: int,
    offloaded_bytes: int = 0,
) -> Decode:
    """The bound for ``batch`` sequences of ``context_tokens`` each, spread evenly over data ranks and pipeline stages.

    Args:
        offloaded_bytes: weights of a GPU that lie in host memory and are read from there in each step.
    """
    # A pipeline works on as many parts of the batch as it has stages; each reads the weights for itself.
    rounds = min(parallel.pipeline, batch)
    part = batch / rounds
    touched = experts_touched(model.experts, model.top_k, part)
    weights = share.read + share.routed * busiest_share(
        model.experts, model.top_k, part, experts_held(model, parallel), parallel.expert_ranks if parallel.expert else 1
    )
    kv = share.kv_bytes(context_tokens) * math.ceil(part / parallel.data)
    on_host = min(offloaded_bytes * weights / share.weights_bytes, weights)
    memory_s = (weights - on_host + kv) / (gpu.bandwidth_gbs * 1e9)
    host_s = on_host / (gpu.host_gbs * 1e9)
    compute_s = part * _token_s(model, parallel, precision, gpu)
    stage_s = max(memory_s, host_s, compute_s)
    limit = {memory_s: "memory bandwidth", host_s: "host memory", compute_s: "arithmetic"}[stage_s]
    return Decode(
        batch=batch,
        experts_touched=touched,
        weights_bytes=round(weights),
        kv_bytes=round(kv),
        # Every stage takes every part in turn; a batch smaller than the pipeline has bubbles.
        step_s=stage_s * parallel.pipeline,
        limit=limit,
    )


def _token_s(model: Architecture, parallel: Parallel, precision: Precision, gpu: Gpu) -> float:
    """Seconds that a pipeline stage's arithmetic takes for a token, attention's scores left out."""
    counted = parameters(model)
    experts = counted.active_experts / parallel.expert_ranks
    # The token is on one data rank, and a batch is spread over all of them.
    dense = (counted.attention + counted.mlp) / parallel.expert_ranks
    head = model.embedding / parallel.expert_ranks / gpu.tflops(precision.kept)
    narrow = precision.kept if precision.experts_only else precision.weights
    work = experts / gpu.tflops(precision.weights) + dense / gpu.tflops(narrow) + head
    return 2 * work / 1e12 / parallel.pipeline


def prefill_s(
    model: Architecture, parallel: Parallel, precision: Precision, gpu: Gpu, tokens: int, alone: bool = True
) -> float:
    """The least time to prefill one prompt: the arithmetic of its projections and of its causal attention.

    Args:
        alone: no other prompt is there, so the other data ranks' attention idles; else it is a prompt's fair share of
            the whole replica.
    """
    counted = parameters(model)
    ranks = parallel.tensor * parallel.pipeline * (1 if alone else parallel.data)
    narrow = precision.kept if precision.experts_only else precision.weights
    experts = counted.active_experts / gpu.tflops(precision.weights) / (parallel.expert_ranks * parallel.pipeline)
    dense = (counted.attention + counted.mlp) / gpu.tflops(narrow) / ranks
    pairs = sum(_pairs(tokens, layer.window) for layer in model.layers)
    scores = pair_flops(model) * pairs / gpu.tflops_16 / ranks
    return (2 * tokens * (experts + dense) + scores) / 1e12


def pair_flops(model: Architecture) -> int:
    """Operations for a query and a key in one layer: the score, and its product with the value."""
    if model.latent is not None:
        return 2 * model.heads * (model.latent.key_size + model.latent.rope_size + model.latent.value_size)
    return 2 * model.heads * model.head_size * 2


def _pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that causal attention looks at."""
    reach = min(tokens, window or tokens)
    return reach * (reach + 1) / 2 + (tokens - reach) * reach
