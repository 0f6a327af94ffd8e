"""A request that goes on where another replica left it: the tokens it has come along, and count as its output.

The new replica treats it as vLLM treats a request of its own that was preempted: the prompt and the tokens so far are
computed anew, in one prefill, and sampling goes on behind them. So all that depends on where the output begins stays
right: ``max_tokens`` and ``min_tokens``, presence and frequency penalties, a seed's random numbers, the state of a
grammar. Sending the tokens as a longer prompt would get each of these wrong.

Pinned to vLLM 0.32.0, into whose internals it reaches; ``tests/integration/test_vllm_contract.py`` says what for:

- A ``Request`` is scheduled by ``num_tokens``, its prompt and its output; what is new to the model runner of version 2
  comes with ``prefill_token_ids`` for both, since that runner forgets preempted requests.
- Tokens travel in ``SamplingParams.extra_args``, which every process of an engine gets.

What vLLM does not do for such a request is patched: its grammar (``hycluster/engine/patches/migrated_grammar.py``) and
its state in a worker of the model runner of version 1 (``migrated_state.py`` beside it).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from hycluster.engine.protocol import MIGRATED


def migrate(request: EngineCoreRequest, engine_id: str, tokens: Sequence[int]) -> EngineCoreRequest:
    """The request as another replica is to get it.

    Args:
        request: as it was sent first.
        engine_id: its id from now on.
        tokens: all of its output so far.
    """
    migrated = copy.copy(request)
    migrated.request_id = engine_id
    if migrated.sampling_params is not None and tokens:
        params = migrated.sampling_params = migrated.sampling_params.clone()
        params.extra_args = {**(params.extra_args or {}), MIGRATED: list(tokens)}
        # Told with the first output, which the caller has.
        params.prompt_logprobs = None
    return migrated


def tokens_of(params: SamplingParams | None) -> list[int]:
    """The tokens that a request brought along."""
    return list((params.extra_args or {}).get(MIGRATED, ())) if params is not None else []


def take_over(request: Request) -> None:
    """Give a request that has just been made for the scheduler its tokens."""
    tokens = tokens_of(request.sampling_params)
    if tokens and not request.num_output_tokens:
        request.append_output_token_ids(tokens)
        # Counted where it began; vLLM asserts that no more than the prompt was found in the cache.
        request.prefill_stats = None
