"""Ranks of logprobs on CPU, computed as they are written.

vLLM 0.32.0 has torch compile the few operations that count them, to save memory on a GPU. On CPU that runs a C++
compiler when the first request with logprobs comes, and again for its next batch size, while all requests of the
replica wait: 5 s each time on two cores, on each replica, and on each successor of one that died.
``tests/integration/test_vllm_contract.py`` says where the function is.
"""

from __future__ import annotations

from typing import Any


def mend(worker: object = None) -> None:
    """Put it into the process of a worker; in a form that vLLM's ``collective_rpc`` can call on each."""
    from vllm.v1.sample import sampler

    module: Any = sampler
    compiled = module.batched_count_greater_than
    module.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)
