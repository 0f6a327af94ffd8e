"""Between the house's nouns and the messages of the gRPC ingress, both ways.

The gRPC ingress and the client share it, so that the two can't drift apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields

from hycluster.core import (
    ChatFields,
    Generation,
    GenerationRequest,
    ModelCard,
    Output,
    Priority,
    Sampling,
    TokenLogprob,
    Usage,
)
from hycluster.errors import InvalidInput
from hycluster.ingress.chats import (
    calls_from_pb,
    calls_to_pb,
    choice_from_pb,
    choice_to_pb,
    kwargs_from_pb,
    messages_from_pb,
    messages_to_pb,
    naming,
    structured_from_pb,
    structured_to_pb,
    tools_from_pb,
    tools_to_pb,
)
from hycluster.ingress.proto import inference_pb2 as pb


def request_from_pb(message: pb.GenerateRequest) -> GenerationRequest:
    """What the caller asks for.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """
    given, has = message.WhichOneof("input"), message.HasField
    return GenerationRequest(
        model=message.model,
        prompt=message.prompt if given == "prompt" else None,
        messages=messages_from_pb(message.messages) if given == "messages" else None,
        token_ids=list(message.token_ids.ids) if given == "token_ids" else None,
        sampling=_sampling_from_pb(message.sampling),
        priority=_priority_from_pb(message.priority),
        request_id=message.request_id or None,
        session_id=message.session_id or None,
        job=message.job or None,
        structured_output=structured_from_pb(message.structured_output) if has("structured_output") else None,
        parallel_tool_calls=message.parallel_tool_calls if has("parallel_tool_calls") else True,
        include_reasoning=message.include_reasoning if has("include_reasoning") else True,
        **chat_fields_from_pb(message),
    )


def chat_fields_from_pb(message: pb.GenerateRequest | pb.TokenizeRequest) -> ChatFields:
    """What the prompt of a chat depends on beside its messages.

    Raises:
        InvalidInput: names the field, the value and what is allowed.
    """
    has = message.HasField
    return ChatFields(
        tools=tools_from_pb(message.tools),
        tool_choice=choice_from_pb(message.tool_choice) if has("tool_choice") else None,
        reasoning_effort=message.reasoning_effort if has("reasoning_effort") else None,
        chat_template_kwargs=kwargs_from_pb(message.chat_template_kwargs) if has("chat_template_kwargs") else None,
    )


def request_to_pb(request: GenerationRequest) -> pb.GenerateRequest:
    """The message for a request.

    Raises:
        InvalidInput: a value that the message can't hold; names the field.
    """
    message = pb.GenerateRequest(
        model=request.model,
        sampling=_sampling_to_pb(request.sampling),
        priority=pb.Priority.Value(request.priority.name),
        request_id=request.request_id or "",
        session_id=request.session_id or "",
        job=request.job or "",
    )
    _prompt_to_pb(request, message)
    if request.token_ids is not None:
        with naming("token_ids"):
            message.token_ids.ids.extend(request.token_ids)
    if request.structured_output is not None:
        message.structured_output.CopyFrom(structured_to_pb(request.structured_output))
    for name in ("parallel_tool_calls", "include_reasoning"):
        with naming(name):
            # Unset is true.
            if getattr(request, name) is not True:
                setattr(message, name, getattr(request, name))
    return message


def tokenize_to_pb(request: GenerationRequest) -> pb.TokenizeRequest:
    """The message for the prompt of a request, which is a text's or a chat's.

    Raises:
        InvalidInput: a value that the message can't hold; names the field.
    """
    message = pb.TokenizeRequest(model=request.model)
    _prompt_to_pb(request, message)
    return message


def _prompt_to_pb(request: GenerationRequest, message: pb.GenerateRequest | pb.TokenizeRequest) -> None:
    if request.prompt is not None:
        with naming("prompt"):
            message.prompt = request.prompt
    if request.messages is not None:
        message.messages.CopyFrom(messages_to_pb(request.messages))
    if request.tools is not None:
        message.tools.extend(tools_to_pb(request.tools))
    if request.tool_choice is not None:
        message.tool_choice.CopyFrom(choice_to_pb(request.tool_choice))
    with naming("reasoning_effort"):
        if request.reasoning_effort is not None:
            message.reasoning_effort = request.reasoning_effort
    with naming("chat_template_kwargs"):
        if request.chat_template_kwargs is not None:
            message.chat_template_kwargs = json.dumps(request.chat_template_kwargs, ensure_ascii=False)


def response_to_pb(generation: Generation) -> pb.GenerateResponse:
    """The message for a whole answer."""
    return pb.GenerateResponse(
        request_id=generation.request_id,
        model=generation.model,
        outputs=[
            pb.Output(
                index=output.index,
                text=output.text,
                token_ids=output.token_ids,
                finish_reason=output.finish_reason or "",
                logprobs=_logprobs_to_pb(output.logprobs),
                reasoning=output.reasoning,
                tool_calls=calls_to_pb(output.tool_calls),
            )
            for output in generation.outputs
        ],
        usage=None if generation.usage is None else _usage_to_pb(generation.usage),
    )


def response_from_pb(message: pb.GenerateResponse) -> Generation:
    """A whole answer."""
    return Generation(
        request_id=message.request_id,
        model=message.model,
        outputs=[_output_from_pb(output) for output in message.outputs],
        usage=_usage_from_pb(message.usage) if message.HasField("usage") else None,
    )


def chunks_to_pb(generation: Generation) -> list[pb.GenerateChunk]:
    """The messages for one delta: one for each sequence in it, ``usage`` in the last of them."""
    chunks = [
        pb.GenerateChunk(
            request_id=generation.request_id,
            index=output.index,
            text=output.text,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason or "",
            logprobs=_logprobs_to_pb(output.logprobs),
            reasoning=output.reasoning,
            tool_calls=calls_to_pb(output.tool_calls),
        )
        for output in generation.outputs
    ]
    if generation.usage is not None:
        chunks = chunks or [pb.GenerateChunk(request_id=generation.request_id)]
        chunks[-1].usage.CopyFrom(_usage_to_pb(generation.usage))
    return chunks


def chunk_from_pb(model: str, message: pb.GenerateChunk) -> Generation:
    """One delta; it has no output if it brings nothing but the usage."""
    brings_output = (
        message.text or message.token_ids or message.finish_reason or message.reasoning or message.tool_calls
    )
    return Generation(
        request_id=message.request_id,
        model=model,
        outputs=[_output_from_pb(message)] if brings_output else [],
        usage=_usage_from_pb(message.usage) if message.HasField("usage") else None,
    )


def models_to_pb(cards: Iterable[ModelCard]) -> pb.ListModelsResponse:
    """The message for the models that are served."""
    return pb.ListModelsResponse(
        models=[
            pb.Model(name=card.name, max_model_len=card.max_model_len, ready_replicas=card.ready_replicas)
            for card in cards
        ]
    )


def models_from_pb(message: pb.ListModelsResponse) -> list[ModelCard]:
    """The models that are served."""
    return [
        ModelCard(name=model.name, max_model_len=model.max_model_len, ready_replicas=model.ready_replicas)
        for model in message.models
    ]


def _sampling_from_pb(message: pb.Sampling) -> Sampling:
    # The message's fields have the names of the dataclass; ListFields gives those that are set, 0 included.
    given = {field.name: value for field, value in message.ListFields()}
    for name in given.keys() & {"stop", "stop_token_ids"}:
        given[name] = tuple(given[name])
    return Sampling(**given)


def _sampling_to_pb(sampling: Sampling) -> pb.Sampling:
    message = pb.Sampling()
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        with naming(f"sampling.{field.name}"):
            if isinstance(value, (tuple, list)):
                getattr(message, field.name).extend(value)
            elif value is not None:
                setattr(message, field.name, value)
    return message


def _priority_from_pb(value: int) -> Priority:
    # An enum of proto3 is open: a number without a name gets this far.
    if value not in pb.Priority.values():
        allowed = ", ".join(f"{name} ({number})" for name, number in pb.Priority.items())
        raise InvalidInput(f"priority: {value} is not allowed; must be one of {allowed}")
    return Priority[pb.Priority.Name(value)]  # type: ignore[arg-type]  # checked above


def _logprobs_to_pb(logprobs: Sequence[Sequence[TokenLogprob]] | None) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            candidates=[pb.TokenLogprob(token_id=c.token_id, token=c.token, logprob=c.logprob) for c in position]
        )
        for position in logprobs or ()
    ]


def _output_from_pb(message: pb.Output | pb.GenerateChunk) -> Output:
    return Output(
        index=message.index,
        text=message.text,
        token_ids=list(message.token_ids),
        finish_reason=message.finish_reason or None,
        logprobs=[
            [TokenLogprob(token_id=c.token_id, token=c.token, logprob=c.logprob) for c in position.candidates]
            for position in message.logprobs
        ]
        or None,
        reasoning=message.reasoning,
        tool_calls=calls_from_pb(message.tool_calls),
    )


def _usage_to_pb(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )
