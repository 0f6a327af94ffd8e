"""A worker's state of a request that comes with output begins behind it.

What: a new ``CachedRequestState`` has the tokens that its request brought along as its output.
Why: the model runner of version 1 makes the state of every new request without output. (The one of version 2 gets
prompt and output in one, since it forgets preempted requests.)
Upstream: none filed: vLLM has no request that begins with output. vllm-project/vllm#50265 (open) keeps requests over a
fault of one engine, within its process.
Version: vLLM 0.32.0. Applied by the engine in each of its workers. Watched by
``tests/engine/patches/test_migrated_state.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams

PATCHED = "hycluster_migrated"


def patch_states(worker: object, tokens_of: Callable[[SamplingParams | None], Sequence[int]]) -> None:
    """Put it into the process of a worker; in a form that vLLM's ``collective_rpc`` can call on each.

    Args:
        tokens_of: the tokens that come with a request.
    """
    # Here, as it brings all of vLLM's model runner.
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    made: Any = CachedRequestState.__post_init__
    if getattr(made, PATCHED, False):
        return

    @functools.wraps(made)
    def post_init(state: CachedRequestState) -> None:
        tokens = tokens_of(state.sampling_params)
        if tokens and not state.output_token_ids:
            state.output_token_ids = list(tokens)
        made(state)

    setattr(post_init, PATCHED, True)
    CachedRequestState.__post_init__ = post_init  # type: ignore[method-assign]
