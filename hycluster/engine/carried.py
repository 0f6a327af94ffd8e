"""A request that goes on where another replica left it: the tokens it has come along, and count as its output.

The new replica treats it as vLLM treats a request of its own that was preempted: the prompt and the tokens so far are
computed anew, in one prefill, and sampling goes on behind them. So all that depends on where the output begins stays
right: ``max_tokens`` and ``min_tokens``, presence and frequency penalties, a seed's random numbers, the state of a
grammar. Sending the tokens as a longer prompt would get each of these wrong.

Pinned to vLLM 0.32.0, into whose internals it reaches; ``tests/integration/test_vllm_contract.py`` says what for:

- A ``Request`` is scheduled by ``num_tokens``, its prompt and its output; what is new to the model runner of version 2
  comes with ``prefill_token_ids`` for both, since that runner forgets preempted requests. The one of version 1 makes a
  ``CachedRequestState`` without output for it: there it is given the tokens.
- ``StructuredOutputManager._create_grammar`` makes a grammar in its first state: there it is led past the tokens, as
  ``accept_tokens`` does it for tokens that the engine made.
- Tokens travel in ``SamplingParams.extra_args``, which every process of an engine gets.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from hycluster.engine.protocol import CARRIED


def carry(request: EngineCoreRequest, engine_id: str, tokens: Sequence[int]) -> EngineCoreRequest:
    """The request as another replica is to get it.

    Args:
        request: as it was sent first.
        engine_id: its id from now on.
        tokens: all of its output so far.
    """
    carried = copy.copy(request)
    carried.request_id = engine_id
    if carried.sampling_params is not None and tokens:
        params = carried.sampling_params = carried.sampling_params.clone()
        params.extra_args = {**(params.extra_args or {}), CARRIED: list(tokens)}
        # Told with the first output, which the caller has.
        params.prompt_logprobs = None
    return carried


def tokens_of(params: SamplingParams | None) -> list[int]:
    """The tokens that a request brought along."""
    return list((params.extra_args or {}).get(CARRIED, ())) if params is not None else []


def take_over(request: Request) -> None:
    """Give a request that has just been made for the scheduler its tokens."""
    tokens = tokens_of(request.sampling_params)
    if tokens and not request.num_output_tokens:
        request.append_output_token_ids(tokens)
        # Counted where it began; vLLM asserts that no more than the prompt was found in the cache.
        request.prefill_stats = None


def lead_grammars(manager: StructuredOutputManager) -> None:
    """Have an engine's structured output manager lead new grammars past what a request brought along."""
    init: Callable[[Request], None] = manager.grammar_init
    create: Callable[[Request], StructuredOutputGrammar] = manager._create_grammar

    @functools.wraps(init)
    def grammar_init(request: Request) -> None:
        # A reasoning parser looks at all tokens for where the grammar's part begins.
        take_over(request)
        init(request)

    @functools.wraps(create)
    def create_grammar(request: Request) -> StructuredOutputGrammar:
        grammar = create(request)
        tokens, structured = tokens_of(request.sampling_params), request.structured_output_request
        if tokens and structured is not None:
            # On a copy: the scheduler must not find the grammar before it is where the tokens end.
            led = copy.copy(request)
            led.structured_output_request = copy.copy(structured)
            led.structured_output_request.grammar = grammar
            if not manager.accept_tokens(led, tokens):
                raise ValueError(f"request {request.request_id}: its grammar refuses the tokens that it has")
            structured.reasoning_ended = led.structured_output_request.reasoning_ended
        return grammar

    manager.grammar_init = grammar_init  # type: ignore[method-assign]
    manager._create_grammar = create_grammar  # type: ignore[method-assign]


def mend_worker(worker: object = None) -> None:
    """Have a worker of the model runner of version 1 begin behind what a request brought along.

    In a form that vLLM's ``collective_rpc`` can call on each worker.
    """
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    made: Any = CachedRequestState.__post_init__
    if getattr(made, CARRIED, False):
        return

    @functools.wraps(made)
    def post_init(state: CachedRequestState) -> None:
        tokens = tokens_of(state.sampling_params)
        if tokens and not state.output_token_ids:
            state.output_token_ids = tokens
        made(state)

    setattr(post_init, CARRIED, True)
    CachedRequestState.__post_init__ = post_init  # type: ignore[method-assign]
