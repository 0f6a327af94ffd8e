"""The grammar of a request that comes with output begins behind it.

What: an engine's structured output manager leads a new grammar past the tokens that a request brought along, as
``accept_tokens`` does it for tokens that the engine made; and a request has them before its grammar is made, since a
reasoning parser looks at all tokens for where the grammar's part begins.
Why: ``StructuredOutputManager._create_grammar`` makes a grammar in its first state, whatever the request has.
Upstream: none filed: vLLM has no request that begins with output. vllm-project/vllm#50265 (open) keeps requests over a
fault of one engine, within its process.
Version: vLLM 0.32.0. Applied by the engine, on its own manager. Watched by
``tests/engine/patches/test_migrated_grammar.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import copy
import functools
from collections.abc import Callable, Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar


def patch_grammars(
    manager: StructuredOutputManager,
    tokens_of: Callable[[SamplingParams | None], Sequence[int]],
    take_over: Callable[[Request], None],
) -> None:
    """Have a manager lead new grammars past what a request brought along.

    Args:
        tokens_of: the tokens that come with a request.
        take_over: gives them to the request as its output, once.
    """
    init: Callable[[Request], None] = manager.grammar_init
    create: Callable[[Request], StructuredOutputGrammar] = manager._create_grammar

    @functools.wraps(init)
    def grammar_init(request: Request) -> None:
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
            if not manager.accept_tokens(led, list(tokens)):
                raise ValueError(f"request {request.request_id}: its grammar refuses the tokens that it has")
            structured.reasoning_ended = led.structured_output_request.reasoning_ended
        return grammar

    manager.grammar_init = grammar_init  # type: ignore[method-assign]
    manager._create_grammar = create_grammar  # type: ignore[method-assign]
