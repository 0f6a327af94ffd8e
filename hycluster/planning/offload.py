"""What host memory buys: KV blocks kept there, or weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hycluster.planning.architecture import GIB, Architecture
from hycluster.planning.gpus import Gpu
from hycluster.planning.layouts import Fit, Misfit, Workload
from hycluster.planning.precision import Precision
from hycluster.planning.speed import decode_bound, prefill_s
from hycluster.settings.parallel import Parallel


@dataclass(frozen=True, slots=True)
class KvOffload:
    """``hardware.kv_offload_gib``: prompts seen before are read back, not computed again. No more sequences at a time.

    Attributes:
        tokens_per_gib: that each GiB of a data-parallel rank keeps.
        read_tokens_per_s: at most, into one rank's GPUs.
        prefill_tokens_per_s: at most, what the same rank would compute instead.
    """

    tokens_per_gib: int
    read_tokens_per_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class WeightOffload:
    """``engine.cpu_offload_gb``: fewer GPUs, and each step reads what lies in host memory from there.

    Attributes:
        offload_gib: of each GPU, so that one sequence of the demand fits.
        tokens_per_s_each: the bound on decoding one sequence alone.
    """

    parallel: Parallel
    offload_gib: int
    tokens_per_s_each: float


def kv_offload(model: Architecture, fit: Fit, precision: Precision, gpu: Gpu, tokens: int) -> KvOffload:
    """What each GiB of host memory for KV blocks buys.

    Args:
        tokens: of the prompt that prefill is compared with.
    """
    # Each device writes out what it holds, copies of KV heads too; of a latent cache that all tensor ranks of a node
    # have, vLLM 0.32 keeps one copy (vllm/distributed/kv_transfer/kv_connector/v1/offloading/config.py).
    once = model.latent is not None and fit.parallel.pipeline == 1
    rank = 1 if once else fit.parallel.devices_per_rank
    prefill = prefill_s(model, fit.parallel, precision, gpu, tokens)
    return KvOffload(
        tokens_per_gib=GIB // (fit.share.kv_bytes_per_token * rank),
        read_tokens_per_s=gpu.host_gbs * 1e9 / fit.share.kv_bytes_per_token,
        prefill_tokens_per_s=tokens / prefill,
    )


def weight_offload(
    model: Architecture, misfit: Misfit, precision: Precision, gpu: Gpu, demand: Workload
) -> WeightOffload | None:
    """How a layout that is too large would do with weights in host memory; None where even that is not enough."""
    offload_gib = math.ceil(misfit.missing_bytes / GIB)
    if offload_gib * GIB > misfit.share.weights_bytes:
        return None
    decode = decode_bound(
        model, misfit.parallel, misfit.share, precision, gpu, 1, demand.context_tokens, offload_gib * GIB
    )
    return WeightOffload(misfit.parallel, offload_gib, decode.tokens_per_s_each)
