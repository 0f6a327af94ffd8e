"""What belongs to a chat: between OpenAI's form, which is the house's, and the messages of the gRPC ingress."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hycluster.core import StructuredOutput, ToolCall
from hycluster.errors import InvalidInput, shown
from hycluster.ingress.proto import inference_pb2 as pb

MODES = {
    "auto": pb.ToolChoice.MODE_AUTO,
    "none": pb.ToolChoice.MODE_NONE,
    "required": pb.ToolChoice.MODE_REQUIRED,
}
_MODE_NAMES: dict[int, str] = {
    int(pb.ToolChoice.MODE_UNSPECIFIED): "auto",
    **{int(number): name for name, number in MODES.items()},
}


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Give protobuf's refusals, which name no field, the field's name."""
    try:
        yield
    except KeyError as error:
        raise InvalidInput(f"{field}: {error} must be set") from None
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{field}: {error}") from None


def messages_from_pb(message: pb.Messages) -> list[dict[str, Any]]:
    """A chat in OpenAI's form.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    return [_turn_from_pb(f"messages[{place}]", turn) for place, turn in enumerate(message.messages)]


def _turn_from_pb(where: str, turn: pb.ChatMessage) -> dict[str, Any]:
    if not turn.role:
        raise InvalidInput(f"{where}.role: must not be empty")
    if turn.parts and turn.content:
        raise InvalidInput(f"{where}.parts: can't go with content; one of them must be empty")
    said: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.parts:
        said["content"] = [_part_from_pb(f"{where}.parts[{place}]", part) for place, part in enumerate(turn.parts)]
    if turn.tool_calls:
        said["content"] = said["content"] or None
        said["tool_calls"] = [
            _call_from_pb(f"{where}.tool_calls[{place}]", call) for place, call in enumerate(turn.tool_calls)
        ]
    for name in ("name", "tool_call_id", "reasoning"):
        if turn.HasField(name):
            said[name] = getattr(turn, name)
    return said


def _part_from_pb(where: str, part: pb.ContentPart) -> dict[str, Any]:
    kind = part.WhichOneof("part")
    if kind == "text":
        return {"type": "text", "text": part.text}
    if kind is None:
        raise InvalidInput(f"{where}: exactly one of text, image_url must be set; set are none")
    if not part.image_url.url:
        raise InvalidInput(f"{where}.image_url.url: must not be empty")
    image = {"url": part.image_url.url}
    if part.image_url.HasField("detail"):
        image["detail"] = part.image_url.detail
    return {"type": "image_url", "image_url": image}


def _call_from_pb(where: str, call: pb.ToolCall) -> dict[str, Any]:
    for name in ("id", "name"):
        if not getattr(call, name):
            raise InvalidInput(f"{where}.{name}: must not be empty")
    # Templates read them as an object.
    _object_in(f"{where}.arguments", call.arguments or "{}")
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments or "{}"},
    }


def messages_to_pb(chat: Iterable[Mapping[str, Any]]) -> pb.Messages:
    """The message for a chat in OpenAI's form.

    Raises:
        InvalidInput: a key or a value that the gRPC ingress doesn't take; names the message.
    """
    message = pb.Messages()
    for place, turn in enumerate(chat):
        with naming(f"messages[{place}]"):
            given = {name: value for name, value in turn.items() if value is not None}
            content, calls = given.pop("content", ""), given.pop("tool_calls", ())
            added = message.messages.add(**given, content=content if isinstance(content, str) else "")
            if not isinstance(content, str):
                added.parts.extend(_part_to_pb(part) for part in content)
            for number, call in enumerate(calls):
                function = call["function"]
                added.tool_calls.add(
                    index=number, id=call["id"], name=function["name"], arguments=function["arguments"]
                )
    return message


def _part_to_pb(part: Mapping[str, Any]) -> pb.ContentPart:
    if part.get("type") == "image_url":
        return pb.ContentPart(image_url=pb.ImageUrl(**part["image_url"]))
    return pb.ContentPart(text=part["text"])


def tools_from_pb(tools: Sequence[pb.Tool]) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form; None if there are none.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    listed = []
    for place, tool in enumerate(tools):
        where, given = f"tools[{place}].function", tool.function
        if not given.name:
            raise InvalidInput(f"{where}.name: must not be empty")
        function: dict[str, Any] = {"name": given.name}
        if given.HasField("description"):
            function["description"] = given.description
        if given.HasField("parameters"):
            function["parameters"] = _object_in(f"{where}.parameters", given.parameters)
        if given.HasField("strict"):
            function["strict"] = given.strict
        listed.append({"type": "function", "function": function})
    return listed or None


def tools_to_pb(tools: Iterable[Mapping[str, Any]]) -> list[pb.Tool]:
    """The messages for tools in OpenAI's form.

    Raises:
        InvalidInput: a key or a value that the gRPC ingress doesn't take; names the tool.
    """
    listed = []
    for place, tool in enumerate(tools):
        with naming(f"tools[{place}].function"):
            given = {name: value for name, value in tool["function"].items() if value is not None}
            if "parameters" in given:
                given["parameters"] = json.dumps(given["parameters"], ensure_ascii=False)
            listed.append(pb.Tool(function=pb.Function(**given)))
    return listed


def choice_from_pb(choice: pb.ToolChoice) -> str | dict[str, Any]:
    """A choice among tools in OpenAI's form.

    Raises:
        InvalidInput: a mode that there is not.
    """
    if choice.WhichOneof("choice") == "function":
        return {"type": "function", "function": {"name": choice.function}}
    if choice.mode not in _MODE_NAMES:
        raise InvalidInput(
            f"tool_choice.mode: {choice.mode} is not allowed; must be one of"
            f" {', '.join(pb.ToolChoice.Mode.Name(number) for number in MODES.values())}"
        )
    return _MODE_NAMES[choice.mode]


def choice_to_pb(choice: str | Mapping[str, Any]) -> pb.ToolChoice:
    """The message for a choice among tools in OpenAI's form.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """
    if isinstance(choice, str) and choice in MODES:
        return pb.ToolChoice(mode=MODES[choice])
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InvalidInput(
            f"tool_choice: {shown(choice)} is not allowed; must be one of {', '.join(map(repr, MODES))},"
            ' or {"type": "function", "function": {"name": ...}}'
        )
    with naming("tool_choice"):
        return pb.ToolChoice(function=name)


def kwargs_from_pb(text: str) -> dict[str, Any]:
    """What a chat template is told.

    Raises:
        InvalidInput: it is no JSON object.
    """
    return _object_in("chat_template_kwargs", text)


def structured_from_pb(message: pb.StructuredOutput) -> StructuredOutput:
    """What form the output must have.

    Raises:
        InvalidInput: names the field and what is allowed.
    """
    form = message.WhichOneof("form")
    if form is None:
        return StructuredOutput()
    asked: dict[str, Any] = {form: tuple(message.choice.texts) if form == "choice" else getattr(message, form)}
    return StructuredOutput(**asked)


def structured_to_pb(asked: StructuredOutput) -> pb.StructuredOutput:
    """The message for a form of the output.

    Raises:
        InvalidInput: a value that the message can't hold; names the field.
    """
    message = pb.StructuredOutput(json_object=True) if asked.json_object else pb.StructuredOutput()
    for name in ("json_schema", "regex", "grammar", "choice"):
        if (value := getattr(asked, name)) is None:
            continue
        with naming(f"structured_output.{name}"):
            if name == "choice":
                message.choice.texts.extend(value)
            else:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                setattr(message, name, text)
    return message


def calls_to_pb(calls: Iterable[ToolCall]) -> list[pb.ToolCall]:
    """The messages for calls that a model wants."""
    return [pb.ToolCall(index=c.index, id=c.id, name=c.name, arguments=c.arguments) for c in calls]


def calls_from_pb(calls: Iterable[pb.ToolCall]) -> tuple[ToolCall, ...]:
    """Calls that a model wants."""
    return tuple(ToolCall(c.index, c.id, c.name, c.arguments) for c in calls)


def _object_in(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: {shown(text)} is not allowed; must be a JSON object, as text")
    return value
