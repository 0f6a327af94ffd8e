"""What vLLM's API is told of a model, for whoever answers in its name: the HTTP ingress' app, and :mod:`.chat`."""

from __future__ import annotations

import copy
import functools
from argparse import Namespace
from difflib import get_close_matches

from vllm.config import VllmConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import load_chat_template
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hycluster.errors import SettingsError
from hycluster.settings.model import Model


def model_arguments(model: Model, config: VllmConfig) -> Namespace:
    """Arguments of vLLM's API server: its defaults and the model's own, the settings' ``api``.

    Raises:
        SettingsError: there is no such parser or template.
    """
    arguments = copy.deepcopy(_defaults())
    arguments.model = model.source
    arguments.served_model_name = [model.name]
    arguments.structured_outputs_config = config.structured_outputs_config
    for name, value in model.api.items():
        setattr(arguments, name, value)
    if reasoning_parser := model.api.get("reasoning_parser"):
        arguments.structured_outputs_config.reasoning_parser = reasoning_parser
    if plugin := arguments.tool_parser_plugin:
        ToolParserManager.import_tool_parser(plugin)
    if arguments.tool_call_parser and "enable_auto_tool_choice" not in model.api:
        arguments.enable_auto_tool_choice = True
    if arguments.tool_call_parser and arguments.tool_call_parser not in ToolParserManager.list_registered():
        near = get_close_matches(arguments.tool_call_parser, ToolParserManager.list_registered(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SettingsError(
            f"models: {model.name}: api.tool_call_parser: vLLM has no parser {arguments.tool_call_parser!r}{hint}"
        )
    chat_template(model)
    return arguments


def chat_template(model: Model) -> str | None:
    """The ``api.chat_template`` of a model's settings, which is a text or a file's path.

    Raises:
        SettingsError: there is no such template.
    """
    try:
        return load_chat_template(model.api.get("chat_template"))
    except (VLLMValidationError, ValueError, OSError) as error:
        raise SettingsError(f"models: {model.name}: api.chat_template: {error}") from error


@functools.cache
def _defaults() -> Namespace:
    # The parser knows all that an engine can be told, too, and takes its time to be made.
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    return arguments
