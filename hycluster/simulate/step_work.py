"""How long a step takes: by four coefficients, or by the roofline of a GPU. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from hycluster.engine.step_time import StepWork
from hycluster.gateway.prefix_router import StepCost
from hycluster.planning.architecture import Architecture
from hycluster.planning.gpus import Gpu
from hycluster.planning.precision import Precision
from hycluster.planning.shares import DeviceShare
from hycluster.planning.speed import decode_bound, pair_flops
from hycluster.settings.parallel import Parallel

StepSeconds = Callable[[StepWork], float]


@dataclass(frozen=True, slots=True)
class LinearStep:
    """By four coefficients, in seconds; what a fit finds."""

    base_s: float
    prefill_token_s: float
    sequence_s: float
    kv_token_s: float = 0.0

    def __call__(self, work: StepWork) -> float:
        return (
            self.base_s
            + self.prefill_token_s * work.prefill_tokens
            + self.sequence_s * work.sequences
            + self.kv_token_s * work.kv_tokens
        )


class Roofline:
    """By what a GPU can do at best (:mod:`hycluster.planning.speed`), over what share of that kernels reach.

    The weights are read while the step's tokens are computed, so the longer of the two counts: below some hundred
    tokens a step takes as long with one more of them as without. Reading the KV cache, and the scores of prompts, come
    on top. Communication and the host are left out, as there.

    Args:
        efficiency: the share, of bandwidth and of arithmetic.
    """

    def __init__(
        self,
        model: Architecture,
        parallel: Parallel,
        share: DeviceShare,
        precision: Precision,
        gpu: Gpu,
        efficiency: float,
    ) -> None:
        self._kv_token_s = share.kv_bytes_per_token / (gpu.bandwidth_gbs * 1e9) / efficiency
        self._pair_s = len(model.layers) * pair_flops(model) / 1e12 / gpu.tflops_16 / parallel.tensor / efficiency

        @functools.lru_cache(maxsize=1 << 16)
        def tokens_s(tokens: int) -> float:
            return decode_bound(model, parallel, share, precision, gpu, tokens, context_tokens=0).step_s / efficiency

        self._tokens_s = tokens_s

    def __call__(self, work: StepWork) -> float:
        tokens_s: float = self._tokens_s(work.prefill_tokens + work.sequences)
        return tokens_s + self._kv_token_s * work.kv_tokens + self._pair_s * work.prefill_pairs


def step_cost(step_time: StepSeconds, step_tokens: int) -> StepCost:
    """A plane through what steps take: by a full one, half a full one, and one that only decodes.

    Args:
        step_tokens: of a full step.
    """
    full, half = max(2, step_tokens - 1), max(1, step_tokens // 2)
    full_s, half_s = (step_time(StepWork(prefill_tokens=tokens, sequences=1)) for tokens in (full, half))
    lone_s = step_time(StepWork(sequences=1))
    token_s = (full_s - half_s) / (full - half)
    sequence_s = (step_time(StepWork(sequences=33)) - lone_s) / 32
    return StepCost(
        base_s=max(0.0, full_s - token_s * full - sequence_s),
        prefill_token_s=token_s,
        sequence_s=sequence_s,
        kv_token_s=(step_time(StepWork(sequences=1, kv_tokens=1_000_000)) - lone_s) / 1e6,
        step_tokens=step_tokens,
    )
