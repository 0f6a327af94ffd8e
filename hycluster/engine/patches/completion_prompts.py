"""A completion with a list of prompts counts each of them.

What: vLLM's handler of ``/v1/completions`` asks for admission of ``n`` sequences for each prompt of the list.
Why: it asks for ``n`` alone: a list of prompts passes a bound that as many requests would not.
Upstream: none filed. Admission came with vllm-project/vllm#49445 (merged); vllm-project/vllm#47845 (merged) bounds the
list's length.
Version: vLLM 0.32.0. Applied by the HTTP ingress on the handler of each model's app. Watched by
``tests/engine/patches/test_completion_prompts.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

import functools
from collections.abc import Callable
from typing import Any

from vllm.entrypoints.openai.completion.protocol import CompletionRequest


def patch_completions(handler: Any, check_admission: Callable[[int], None]) -> None:
    """Have a handler ask for all prompts.

    Args:
        handler: vLLM's ``OpenAIServingCompletion``.
        check_admission: raises unless so many sequences are admitted.
    """
    complete = handler.create_completion

    @functools.wraps(complete)
    async def admitted(request: CompletionRequest, *rest: Any) -> Any:
        prompt = request.prompt
        # As in vLLM, first: who asks for a model that there is not is to hear so, even while nothing could be admitted.
        if (unknown := await handler._check_model(request)) is not None:
            return unknown
        lists = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        check_admission((request.n or 1) * (len(prompt) if lists and prompt else 1))
        return await complete(request, *rest)

    handler.create_completion = admitted
