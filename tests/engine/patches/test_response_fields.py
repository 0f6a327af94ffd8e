from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]


def written() -> list[str]:
    from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall
    from vllm.entrypoints.openai.chat_completion import protocol
    from vllm.entrypoints.openai.completion import protocol as of_completions

    # Their fields are those that mypy knows, and what they take besides.
    chat: Any = protocol
    completion: Any = of_completions
    of_completion = completion.CompletionResponseStreamChoice(index=0, text="é\n", stop_reason=3, more="x")
    call = DeltaToolCall(index=1, id="call-1", type="function", function=DeltaFunctionCall(name="f", arguments="{"))
    deltas = [DeltaMessage(role="assistant", content=""), DeltaMessage(content="é"), DeltaMessage(tool_calls=[call])]
    of_chat = [chat.ChatCompletionResponseStreamChoice(index=0, delta=delta, other=1) for delta in deltas]
    parts = [
        completion.CompletionStreamResponse(id="cmpl-1", created=1, model="tiny", choices=[of_completion]),
        chat.ChatCompletionStreamResponse(id="chatcmpl-1", created=1, model="tiny", choices=of_chat),
        chat.ChatCompletionStreamResponse(id="chatcmpl-1", created=1, model="tiny", choices=[], beyond=[1]),
    ]
    return [part.model_dump_json(exclude_unset=unset) for part in parts for unset in (True, False)]


# By vLLM 0.32.0 without the patch.
BY_VLLM = [
    r'{"id":"cmpl-1","created":1,"model":"tiny","choices":[{"index":0,"text":"é\n","stop_reason":3,"more":"x"}]}',
    (
        r'{"id":"cmpl-1","object":"text_completion","created":1,"model":"tiny","choices":[{"index":0,"text":"é\n",'
        r'"logprobs":null,"finish_reason":null,"stop_reason":3,"prompt_token_ids":null,"token_ids":null,"more":"x"}],'
        r'"usage":null,"system_fingerprint":null,"metrics":null}'
    ),
    (
        r'{"id":"chatcmpl-1","created":1,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant",'
        r'"content":""},'
        r'"other":1},{"index":0,"delta":{"content":"é"},"other":1},{"index":0,"delta":{"tool_calls":[{"id":"call-1",'
        r'"type":"function","index":1,"function":{"name":"f","arguments":"{"}}]},"other":1}]}'
    ),
    r'{"id":"chatcmpl-1","created":1,"model":"tiny","choices":[],"beyond":[1]}',
]


def test_parts_are_written_as_by_vllm() -> None:
    from hycluster.engine.patches.response_fields import patch_parts

    patch_parts()
    first, second, third, _, fourth, _ = written()
    assert [first, second, third, fourth] == BY_VLLM


def test_no_part_is_looked_through() -> None:
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.engine.protocol import OpenAIBaseModel

    from hycluster.engine.patches.response_fields import PARTS, VALIDATOR, patch_parts

    patch_parts()
    # The day on which vLLM has it no more, this patch can go.
    assert VALIDATOR in OpenAIBaseModel.__pydantic_decorators__.model_validators
    looked = list[str]()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == VALIDATOR:
            looked.append(str(frame.f_locals["cls"]))

    sys.setprofile(note)
    try:
        CompletionRequest.model_validate({"prompt": "hello"})
        seen = len(looked)
        for part in PARTS:
            made = {"id": "1", "model": "tiny", "choices": []} if "choices" in part.model_fields else {}
            delta = {"delta": DeltaMessage()} if "delta" in part.model_fields else {}
            part.model_validate({"index": 0, "text": "", **made, **delta})
    finally:
        sys.setprofile(None)
    assert seen
    assert looked[seen:] == []
