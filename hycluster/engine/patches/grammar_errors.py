"""Whose grammar an engine can't compile, or can't go on with as it allows nothing, hears why.

What: the output that ends such a request has the reason as its ``stop_reason``.
Why: vLLM ends it as it ends one that the engine's own fault has lost, so its caller is told 503, and a service that
repeats those repeats it for ever. A grammar that allows nothing (a rule that is nothing but itself) compiles: then no
token is masked in, one is drawn all the same, and rejected.
Upstream: none filed.
Version: vLLM 0.32.0. Applied by the engine, on its own scheduler. Watched by
``tests/engine/patches/test_grammar_errors.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreOutputs

# Libraries show what they were given.
MOST_SAID = 300
NOTHING = "structured_outputs: allows nothing at all, or nothing after what there is so far"


def patch_reasons(scheduler: Any) -> None:
    """
    Args:
        scheduler: vLLM's, which compiles grammars beside its steps.
    """
    manager = scheduler.structured_output_manager
    update: Callable[..., dict[int, EngineCoreOutputs]] = scheduler.update_from_output
    accept: Callable[[Any, list[int]], bool] = manager.accept_tokens
    stuck: dict[str, str | None] = {}

    @functools.wraps(accept)
    def accept_tokens(request: Any, tokens: list[int]) -> bool:
        accepted = accept(request, tokens)
        if not accepted and _allows_nothing(manager, request):
            stuck[request.request_id] = NOTHING
        return accepted

    @functools.wraps(update)
    def update_from_output(*arguments: Any, **named: Any) -> dict[int, EngineCoreOutputs]:
        reasons = {name: _reason(scheduler.requests.get(name)) for name in scheduler.grammar_compile_error_reqs}
        outputs = update(*arguments, **named)
        reasons |= stuck
        stuck.clear()
        if reasons:
            for output in (output for step in outputs.values() for output in step.outputs):
                output.stop_reason = reasons.get(output.request_id, output.stop_reason)
        return outputs

    scheduler.update_from_output = update_from_output
    manager.accept_tokens = accept_tokens


def _allows_nothing(manager: Any, request: Any) -> bool:
    """A token that was rejected where others are allowed is the engine's own fault."""
    bitmask = manager.backend.allocate_token_bitmask(1)
    request.structured_output_request.grammar.fill_bitmask(bitmask, 0)
    return not bitmask.any()


def _reason(request: Any) -> str | None:
    asked = None if request is None else request.structured_output_request
    if asked is None:
        return None
    return f"structured_outputs: no engine can compile it: {' '.join(str(asked.grammar).split())[:MOST_SAID]}"
