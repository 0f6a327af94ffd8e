"""A grammar is compiled by the library that has been found to take it.

What: an engine's structured output manager has a backend for each library that its requests name, and compiles each
request's grammar with its own.
Why: ``StructuredOutputManager.grammar_init`` keeps the one that the first request names. Requests are checked with
xgrammar, and with llguidance where xgrammar refuses; so a grammar that only llguidance takes (``\\p{L}`` in a regex,
``minProperties``) failed in each engine that had compiled any other before, and one such request had its engine compile
all later ones with llguidance.
Upstream: none filed; its comment says "for now".
Version: vLLM 0.32.0. Applied by the engine, on its own manager. Watched by
``tests/engine/patches/test_grammar_backends.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import copy
import functools
from collections.abc import Callable

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar


def patch_backends(manager: StructuredOutputManager) -> None:
    """Have a manager compile each request's grammar with what the request names. Rows of its bitmask have one form,
    whoever fills them."""
    backends: dict[str | None, StructuredOutputBackend] = {}
    init: Callable[[Request], None] = manager.grammar_init
    create: Callable[[StructuredOutputManager, Request], StructuredOutputGrammar] = type(manager)._create_grammar
    clear: Callable[[], None] = manager.clear_backend

    @functools.wraps(init)
    def grammar_init(request: Request) -> None:
        if request.structured_output_request is None:
            return
        name, before = _backend_of(request), manager.backend
        manager.backend = backends.get(name)
        try:
            init(request)
        finally:
            if manager.backend is None:
                manager.backend = before
            else:
                backends[name] = manager.backend

    def create_grammar(request: Request) -> StructuredOutputGrammar:
        # Asked in a thread, maybe when the next request has its turn: read first, it is this request's own unless that
        # is among the others already.
        latest = manager.backend
        own = copy.copy(manager)
        own.backend = backends.get(_backend_of(request), latest)
        return create(own, request)

    @functools.wraps(clear)
    def clear_backend() -> None:
        current = manager.backend
        clear()
        for backend in backends.values():
            if backend is not current:
                backend.destroy()
        backends.clear()

    manager.grammar_init = grammar_init  # type: ignore[method-assign]
    manager._create_grammar = create_grammar  # type: ignore[method-assign]
    manager.clear_backend = clear_backend  # type: ignore[method-assign]


def _backend_of(request: Request) -> str | None:
    params = request.sampling_params
    asked = None if params is None else params.structured_outputs
    return None if asked is None else asked._backend
