"""A chat as vLLM's own HTTP app has it: the same prompt for the same messages and tools, and the same reading of what
the model says. The gRPC ingress and batch jobs come through here; a test compares the two.

vLLM's renderer makes the prompt, and says what the output must look like for its tools; vLLM's parsers find reasoning
and tool calls in the text. What is told here is only which of it goes into an answer, as in vLLM's
``entrypoints/openai/chat_completion/serving.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.generate.base.protocol import DeltaToolCall, FunctionCall
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam, ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput
from vllm.outputs import RequestOutput
from vllm.parser import Parser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import StructuredOutputsParams

from hycluster.core import GenerationRequest, Output, StructuredOutput, ToolCall
from hycluster.engine.patches.split_calls import patch_split_calls
from hycluster.engine.patches.truncated_calls import patch_truncated_calls
from hycluster.errors import InvalidInput
from hycluster.gateway.api_arguments import chat_template
from hycluster.gateway.gateway import Gateway

patch_split_calls()
patch_truncated_calls()
# By our word for what is asked: vLLM's.
_STRUCTURED = {field.name: field.name for field in fields(StructuredOutput)} | {"json_schema": "json"}


def structured_outputs(asked: StructuredOutput | None) -> StructuredOutputsParams | None:
    """What vLLM is told of the output's form; ``choice`` is a list there."""
    if asked is None:
        return None
    given = {theirs: value for ours, theirs in _STRUCTURED.items() if (value := getattr(asked, ours))}
    if "choice" in given:
        given["choice"] = list(given["choice"])
    return StructuredOutputsParams(**given)


class ModelChat:
    """How one model is talked to."""

    def __init__(self, gateway: Gateway) -> None:
        told = gateway.api
        self.name = gateway.model.name
        self.model_config = gateway.model_config
        self.tokenizer = gateway.renderer.get_tokenizer()
        self.auto_tools = bool(told.enable_auto_tool_choice)
        self.renderer = OnlineRenderer(
            model_config=gateway.model_config,
            renderer=gateway.renderer,
            request_logger=None,
            chat_template=chat_template(gateway.model),
            chat_template_content_format=told.chat_template_content_format,
            enable_auto_tools=told.enable_auto_tool_choice,
            exclude_tools_when_tool_choice_none=told.exclude_tools_when_tool_choice_none,
            tool_parser=told.tool_call_parser,
            tool_strict_level=told.tool_strict_level,
            reasoning_parser=told.structured_outputs_config.reasoning_parser,
            default_chat_template_kwargs=resolve_default_chat_template_kwargs(told),
        )

    async def render(self, request: GenerationRequest) -> Turn:
        """The prompt of a chat, and how its answer is to be read.

        Raises:
            InvalidInput: names the field, the value and what is allowed.
        """
        assert request.messages is not None
        self._check_messages(request.messages)
        asked = _asked(self.name, request)
        self._check_tools(asked)
        rendered = await self.renderer.render_chat(asked)
        if isinstance(rendered, ErrorResponse):
            raise InvalidInput(f"messages: {rendered.error.message}")
        _, (engine_input,) = rendered
        return Turn(self, asked, engine_input)

    def _check_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        for number, message in enumerate(messages):
            # vLLM's own API server checks this before it renders.
            if not isinstance(message, dict) or not message.get("role"):
                raise InvalidInput(f"messages[{number}].role: must be set")
            content = message.get("content")
            if not isinstance(content, list) or self.model_config.is_multimodal_model:
                continue
            for place, part in enumerate(content):
                kind = part.get("type", "text") if isinstance(part, dict) else "text"
                if kind not in _TEXTS:
                    where = f"messages[{number}].content[{place}].{kind}"
                    raise InvalidInput(f"{where}: is not allowed; model {self.name!r} takes text only")

    def _check_tools(self, asked: ChatCompletionRequest) -> None:
        """vLLM says it in the words of its own command line."""
        parser = self.renderer.parser
        if asked.tool_choice in (None, "none") or self.renderer.use_harmony:
            return
        if parser is None or parser.tool_parser_cls is None:
            raise InvalidInput(
                f"tools: model {self.name!r} has no parser for tool calls: its settings have no"
                ' api.tool_call_parser, or api.enable_auto_tool_choice is false; tool_choice must be "none"'
            )


_TEXTS = ("text", "input_text", "output_text", "refusal", "thinking")


class Turn:
    """One request to a model in a chat, and its answer.

    Attributes:
        engine_input: the prompt.
        structured: the form of the output, be it asked for or what the tools need.
        skip_special_tokens: False if the parsers have to see them.
        engine_arguments: what the engine has to know of reasoning, for the form of an output begins behind it.
    """

    def __init__(self, chat: ModelChat, asked: ChatCompletionRequest, engine_input: EngineInput) -> None:
        self._chat = chat
        self._asked = asked
        self._choice = asked.tool_choice
        self._named = isinstance(asked.tool_choice, ChatCompletionNamedToolChoiceParam)
        self._kwargs = chat.renderer.effective_chat_template_kwargs(asked)
        self._parsers: dict[int, Parser] = {}
        self._called: set[int] = set()
        self._begun: set[int] = set()
        self.engine_input = engine_input
        self.structured = asked.extract_structured_outputs()
        self.skip_special_tokens = asked.skip_special_tokens
        self.engine_arguments = self._engine_arguments()

    def _engine_arguments(self) -> dict[str, Any]:
        ids = self.engine_input.get("prompt_token_ids") or []
        parser = self._parser()
        reasons = parser is not None and parser.reasoning_parser is not None
        return {
            "reasoning_ended": self._asked.resolve_reasoning_ended(parser, list(ids)),  # type: ignore[call-overload]
            "reasoning_parser_kwargs": {"chat_template_kwargs": self._kwargs} if reasons else None,
        }

    def _parser(self) -> Parser | None:
        kind = self._chat.renderer.parser
        if kind is None:
            return None
        tools: Any = self._asked.tools
        return kind(
            self._chat.tokenizer,
            tools,
            chat_template_kwargs=self._kwargs,
            model_config=self._chat.model_config,
        )

    @property
    def _hides(self) -> bool:
        """Ids and logprobs would tell the reasoning that is to be left out."""
        return not self._asked.include_reasoning

    def whole(self, result: RequestOutput, outputs: Sequence[Output]) -> list[Output]:
        """All that was said, taken apart."""
        return [self._whole(result, output) for output in outputs]

    def _whole(self, result: RequestOutput, output: Output) -> Output:
        # Parsers have a state: each sequence gets one of its own.
        parser = self._parser()
        if parser is None:
            return output
        if result.prompt_token_ids is not None:
            parser.set_prompt_token_ids(result.prompt_token_ids)
        reasoning, content, calls = parser.parse(
            output.text,
            self._asked,
            enable_auto_tools=self._chat.auto_tools,
            model_output_token_ids=output.token_ids,
        )
        called = _calls(calls or ()) if self._takes_calls else ()
        if self._asked.parallel_tool_calls is False:
            called = called[:1]
        finish = output.finish_reason
        if (called and not self._named and self._choice != "required") or (
            self._choice == "required" and finish == "stop"
        ):
            finish = "tool_calls"
        return replace(
            output,
            text=content or "",
            reasoning="" if self._hides else reasoning or "",
            tool_calls=called,
            finish_reason=finish,
            token_ids=[] if self._hides else output.token_ids,
            logprobs=None if self._hides else output.logprobs,
        )

    @property
    def _takes_calls(self) -> bool:
        if self._named or self._choice == "required":
            return True
        kind = self._chat.renderer.parser
        can = self._chat.auto_tools and kind is not None and kind.tool_parser_cls is not None
        return bool(can and self._asked.tools and self._choice in ("auto", None))

    def deltas(self, result: RequestOutput, outputs: Sequence[Output]) -> list[Output]:
        """What is new in a stream, taken apart. What has nothing to tell is left out."""
        read = [self._delta(result, output) for output in outputs]
        return [output for output in read if output is not None]

    def _delta(self, result: RequestOutput, output: Output) -> Output | None:
        index = output.index
        if not output.text and not output.token_ids and index not in self._begun:
            # The prompt is not through.
            return output if output.finish_reason else None
        self._begun.add(index)
        parser = self._parsers.get(index) or self._parser()
        if parser is None:
            return output
        self._parsers[index] = parser
        said = parser.parse_delta(
            delta_text=output.text,
            delta_token_ids=output.token_ids,
            request=self._asked,
            prompt_token_ids=result.prompt_token_ids,
            finished=output.finish_reason is not None,
        )
        calls = tuple(map(_piece, said.tool_calls)) if said is not None else ()
        if calls:
            self._called.add(index)
        if self._asked.parallel_tool_calls is False:
            calls = tuple(call for call in calls if call.index == 0)
        finish = output.finish_reason
        if finish == "stop" and index in self._called and not self._named:
            finish = "tool_calls"
        read = replace(
            output,
            text=(said.content or "") if said is not None else "",
            reasoning=(said.reasoning or "") if said is not None else "",
            tool_calls=calls,
            finish_reason=finish,
            token_ids=[] if self._hides else output.token_ids,
            logprobs=None if self._hides else output.logprobs,
        )
        tells = read.text or read.reasoning or calls or read.token_ids or finish
        return read if tells else None


def _calls(calls: Sequence[FunctionCall]) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(index, call.id or make_tool_call_id(), call.name, call.arguments) for index, call in enumerate(calls)
    )


def _piece(call: DeltaToolCall) -> ToolCall:
    function = call.function
    return ToolCall(
        call.index,
        call.id or "",
        (function.name if function else None) or "",
        (function.arguments if function else None) or "",
    )


def _asked(model: str, request: GenerationRequest) -> ChatCompletionRequest:
    """The request as vLLM's app has it, sampling aside."""
    given: dict[str, Any] = {
        name: value
        for name in ("tools", "tool_choice", "reasoning_effort", "chat_template_kwargs")
        if (value := getattr(request, name)) is not None
    }
    messages: Any = request.messages
    try:
        return ChatCompletionRequest(
            model=model,
            messages=messages,
            n=request.sampling.n,
            # Sampling is the gateway's, which cuts max_tokens to what is left. Unset, an older field is read.
            max_completion_tokens=0,
            parallel_tool_calls=request.parallel_tool_calls,
            include_reasoning=request.include_reasoning,
            structured_outputs=structured_outputs(request.structured_output),
            **given,
        )
    except VLLMValidationError as error:
        raise InvalidInput(f"{error.parameter or 'tools'}: {error.args[0]}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{_place(first['loc'])}: {first['msg']}") from error


def _place(where: Sequence[int | str]) -> str:
    """A field by our words; what pydantic says of the kinds that it tried is left out."""
    text = ""
    for step in where:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isidentifier() and step.islower():
            text += f".{step}" if text else step
    return text or "messages"
