"""The parts of a streamed answer are made without a look for fields that a request should not have.

What: the models of streamed answers have no validator ``__log_extra_fields__`` any more, which all of vLLM's models of
the OpenAI API have.
Why: it logs what a caller sent and nobody reads. For answers, which vLLM makes itself, it finds nothing, and is called
three times or more for each token of each stream: a third of the time that it takes to make a part.
Upstream: none filed.
Version: vLLM 0.32.0. Applied in whatever process has vLLM's API app. Watched by
``tests/engine/patches/test_response_fields.py``.
"""

from __future__ import annotations

from hycluster.engine.patches.pinned import pinned_to

pinned_to("vllm", "0.32.0", __name__)

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice, CompletionStreamResponse
from vllm.entrypoints.serve.engine.protocol import OpenAIBaseModel

VALIDATOR = "__log_extra_fields__"
# What is in another one is before it: that takes over the validators that it has.
PARTS: tuple[type[OpenAIBaseModel], ...] = (
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
    DeltaMessage,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)


def patch_parts() -> None:
    """Take the validator off; once is enough."""
    for part in PARTS:
        if part.__pydantic_decorators__.model_validators.pop(VALIDATOR, None) is not None:
            part.model_rebuild(force=True)
