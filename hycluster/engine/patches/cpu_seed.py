"""A request with a seed and a prompt of several chunks, on CPU.

What: the random generator of such a request can be turned back to where its sampling stands: to the seed, and one draw
forward for each token so far, as vLLM's sampler on CPU draws one number a token. (Not so for rejection sampling and
``fp64`` noise: those are then random, and no longer the same for the same seed.)
Why: a step that ends before the end of the prompt samples a token all the same, and throws it away. vLLM then turns the
generator back by an offset; torch's generators on CPU have none and raise, which ends the engine and every request on
it.
Upstream: none filed against vLLM's CPU backend. Backends that sample with CPU generators have patched it for themselves
(RBLN-SW/vllm-rbln#1025, qualcomm/vllm-qaic#92).
Version: vLLM 0.32.0. Applied by the engine in each of its workers. Watched by
``tests/engine/patches/test_cpu_seed.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu_input_batch import CachedRequestState

# What the sampler draws a number below; how far the generator moves by it does not depend on it.
DRAW_BELOW = 2**31
PATCHED = "hycluster_seeds"


class SeededGenerator(torch.Generator):
    """A generator on CPU that can be turned back to where a request's sampling stands."""

    @classmethod
    def of(cls, state: CachedRequestState, seed: int) -> SeededGenerator:
        generator = cls(device="cpu")
        generator._state, generator._seed = state, seed
        generator.set_offset(0)
        return generator

    _state: CachedRequestState
    _seed: int

    def get_offset(self) -> int:
        """There is none; ``set_offset`` needs none."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Forget all draws but those of the tokens that the request has."""
        self.manual_seed(self._seed)
        tokens = len(self._state.output_token_ids)
        if tokens:
            torch.randint(0, DRAW_BELOW, (tokens,), generator=self)
        return self


def patch_seeds(worker: object = None) -> None:
    """Put it into the process of a worker; in a form that vLLM's ``collective_rpc`` can call on each."""
    made: Any = CachedRequestState.__post_init__
    if not getattr(made, PATCHED, False):
        CachedRequestState.__post_init__ = _seeded(made)  # type: ignore[method-assign]


def _seeded(made: Callable[[CachedRequestState], None]) -> Callable[[CachedRequestState], None]:
    @functools.wraps(made)
    def post_init(state: CachedRequestState) -> None:
        made(state)
        if state.generator is not None and state.sampling_params is not None and state.sampling_params.seed is not None:
            state.generator = SeededGenerator.of(state, state.sampling_params.seed)

    setattr(post_init, PATCHED, True)
    return post_init
