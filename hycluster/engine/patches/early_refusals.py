"""What refuses a stream refuses it before it begins.

What: a handler that gives a stream has had all of what it asks the engines for checked; what refuses it is raised.
Why: vLLM checks a request when its first token is awaited, behind the status 200. Of ``/v1/completions`` and
``/v1/chat/completions`` the stream then says what is wrong, ``/v1/messages`` calls it an internal error, and that of
``/v1/responses`` breaks off.
Upstream: none filed.
Version: vLLM 0.32.0. Applied by the HTTP ingress on the handlers of each model's app. Watched by
``tests/engine/patches/test_early_refusals.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

from vllm.sampling_params import SamplingParams

Checking = Callable[[], AbstractContextManager[Callable[[], Awaitable[None]]]]
_METHODS = ("create_chat_completion", "create_completion", "create_responses")
# What of an answer's first turn is what it asks an engine for.
_ASKED = ("lora_request", "priority", "session_id", "reasoning_parser_kwargs")


def patch_streams(handler: Any, checking: Checking, check: Callable[..., Any]) -> None:
    """Have a handler check before it gives a stream.

    Args:
        handler: of vLLM's, for one of the routes that generate.
        checking: around what asks for answers; gives what awaits those checks of it that take time.
        check: does the others, of a prompt, sampling parameters and a request's id; gives the prompt to ask with.
    """
    for method in _METHODS:
        if hasattr(handler, method):
            setattr(handler, method, _checked(getattr(handler, method), checking))
    if hasattr(handler, "_generate_with_builtin_tools"):
        handler._generate_with_builtin_tools = _checked_turn(handler._generate_with_builtin_tools, check)
    if hasattr(handler, "beam_search"):
        handler.beam_search = _checked_beams(handler.beam_search, check)


def _checked(create: Any, checking: Checking) -> Any:
    @functools.wraps(create)
    async def created(*asked: Any, **named: Any) -> Any:
        with checking() as check_rest:
            answer = await create(*asked, **named)
            if isinstance(answer, AsyncGenerator):
                try:
                    await check_rest()
                except BaseException:
                    await answer.aclose()
                    raise
        return answer

    return created


def _checked_turn(generate: Any, check: Callable[..., Any]) -> Any:
    """A response's first turn, with which the engines are asked as its first token is awaited."""

    @functools.wraps(generate)
    def begun(*, request_id: str, engine_input: Any, sampling_params: Any, **named: Any) -> Any:
        asked = {name: named[name] for name in _ASKED if name in named}
        checked = check(engine_input, sampling_params, f"{request_id}_0", **asked)
        return generate(request_id=request_id, engine_input=checked, sampling_params=sampling_params, **named)

    return begun


def _checked_beams(search: Any, check: Callable[..., Any]) -> Any:
    """A beam search, whose first step is asked for as its first token is awaited, with so many logprobs."""

    @functools.wraps(search)
    def begun(*, prompt: Any, request_id: str, params: Any, **named: Any) -> Any:
        step = SamplingParams(logprobs=2 * params.beam_width, max_tokens=1, temperature=params.temperature)
        check(prompt, step, request_id, **{name: named[name] for name in _ASKED if name in named})
        return search(prompt=prompt, request_id=request_id, params=params, **named)

    return begun
