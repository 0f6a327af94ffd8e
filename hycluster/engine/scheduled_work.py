"""What vLLM's requests are in a step, as :class:`StepWork`. Pure but for vLLM's type of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm.v1.request import Request

from hycluster.engine.step_time import StepWork, prefill_pairs


def scheduled_work(
    rows: Mapping[str, int], total: int, requests: Mapping[str, Request], elsewhere_tokens: int = 0
) -> StepWork:
    """Of a step that was scheduled, and so counts as computed already.

    Args:
        rows: tokens in the step by the request's id.
        total: their sum.
        elsewhere_tokens: see :class:`StepWork`.
    """
    kv = sum([requests[one].num_computed_tokens for one in rows])
    pairs = 0
    if total > len(rows):
        chunks = [(tokens, requests[one].num_computed_tokens) for one, tokens in rows.items() if tokens > 1]
        pairs = sum([prefill_pairs(tokens, computed - tokens) for tokens, computed in chunks])
    return StepWork(total - len(rows), len(rows), kv, pairs, elsewhere_tokens=elsewhere_tokens)


def coming_work(requests: Iterable[Request], rows: int, most_tokens: int, elsewhere_tokens: int) -> StepWork:
    """Of a step in which so many requests are, in this order, as far as there are tokens."""
    left = most_tokens
    prefill = kv = pairs = 0
    for request in requests:
        tokens = max(1, min(left, request.num_tokens - request.num_computed_tokens))
        prefill += tokens - 1
        kv += request.num_computed_tokens
        pairs += prefill_pairs(tokens, request.num_computed_tokens)
        left -= tokens
        if left <= 0:
            break
    return StepWork(prefill, rows, kv, pairs, elsewhere_tokens=elsewhere_tokens)
