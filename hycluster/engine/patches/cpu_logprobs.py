"""Ranks of logprobs on CPU are computed as they are written.

What: ``batched_count_greater_than``, as vLLM's sampler calls it, is the function that ``torch.compile`` was given.
Why: vLLM has torch compile the few operations that count ranks, to save memory on a GPU. On CPU that runs a C++
compiler when the first request with logprobs comes, and again for its next batch size, while all requests of the
replica wait: 5 s each time on two cores, on each replica, and on each successor of one that died.
Upstream: none filed against vLLM's CPU backend. The same delay is told of in torch-spyre/sendnn-inference#550;
vllm-project/vllm#38933 (merged) spares the second compilation for a batch of one, not the first.
Version: vLLM 0.32.0. Applied by the engine in each of its workers. Watched by
``tests/engine/patches/test_cpu_logprobs.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from typing import Any


def patch_logprobs(worker: object = None) -> None:
    """Put it into the process of a worker; in a form that vLLM's ``collective_rpc`` can call on each."""
    from vllm.v1.sample import sampler

    module: Any = sampler
    compiled = module.batched_count_greater_than
    module.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)
