"""What vLLM answers is what it can be asked with next: the layer gives its output items back as they are."""

from __future__ import annotations

from typing import Any

import pytest

from hycluster.responses.records import StoredResponse, as_items

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_imported")]
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
CALL_OUTPUT: Any = {"type": "function_call_output", "call_id": "c1", "output": "7"}


def answered(**parts: Any) -> list[dict[str, Any]]:
    """The output of a response as vLLM writes it."""
    from vllm.entrypoints.openai.responses.utils import build_response_output_items

    given = {"reasoning": None, "content": None, "tool_calls": None} | parts
    return [item.model_dump(mode="json", by_alias=True) for item in build_response_output_items(**given)]


def messages(output: list[dict[str, Any]], *more: dict[str, Any]) -> list[Any]:
    """What the chat template is given for the next request."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.utils import construct_input_messages

    record = StoredResponse(id="r", items=as_items("hello"), response={"output": output})
    asked = {"model": "m", "input": [*record.conversation, *more], "tools": [TOOL]}
    said: list[Any] = construct_input_messages(request_input=ResponsesRequest.model_validate(asked).input)
    return said


def test_text_and_reasoning() -> None:
    said = messages(answered(reasoning="hm", content="yes"), *as_items("and?"))
    assert said == [
        {"type": "message", "role": "user", "content": "hello"},
        {"role": "assistant", "reasoning": "hm", "content": "yes"},
        {"type": "message", "role": "user", "content": "and?"},
    ]


def test_a_call_and_its_output() -> None:
    from vllm.entrypoints.generate.base.protocol import FunctionCall

    call = FunctionCall(id="c1", name="f", arguments='{"a": 1}')
    _, called, output = messages(answered(tool_calls=[call]), CALL_OUTPUT)
    (named,) = called["tool_calls"]
    assert (named["id"], named["function"]) == ("c1", {"name": "f", "arguments": '{"a": 1}'})
    assert output == {"role": "tool", "content": "7", "tool_call_id": "c1"}


def test_nothing_at_all() -> None:
    """vLLM answers an empty message where the model says nothing, and can't read it."""
    empty = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": []}
    assert len(messages([empty], *as_items("and?"))) == 2


def test_harmony_takes_them_too() -> None:
    from vllm.entrypoints.generate.base.protocol import FunctionCall
    from vllm.entrypoints.openai.responses.harmony import response_input_to_harmony
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    call = FunctionCall(id="c1", name="f", arguments="{}")
    record = StoredResponse(
        id="r", items=as_items("hello"), response={"output": answered(reasoning="hm", content="yes", tool_calls=[call])}
    )
    asked = {"model": "m", "input": [*record.conversation, CALL_OUTPUT], "tools": [TOOL]}
    items: Any = ResponsesRequest.model_validate(asked).input
    before: list[Any] = []
    channels = []
    for item in items:
        message = response_input_to_harmony(item, before)
        before.append(item)
        assert message is not None
        channels.append((message.author.role.value, message.channel))
    assert channels == [
        ("user", None), ("assistant", "analysis"), ("assistant", "final"), ("assistant", "commentary"),
        ("tool", "commentary"),
    ]  # fmt: skip


def test_vllms_own_way_still_drops_the_call() -> None:
    """On the day on which it does not, one reason less for a layer of ours."""
    from openai.types.responses import ResponseFunctionToolCall
    from vllm.entrypoints.openai.responses.utils import construct_input_messages

    call = ResponseFunctionToolCall(type="function_call", call_id="c1", name="f", arguments="{}")
    said = construct_input_messages(request_input=[CALL_OUTPUT], prev_msg=[], prev_response_output=[call])
    assert [message["role"] for message in said] == ["tool"]
