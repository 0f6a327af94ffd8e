"""What vLLM's API is told of a model, for whoever answers in its name: the HTTP ingress' app, and :mod:`.chat`."""

from __future__ import annotations

from argparse import Namespace
from difflib import get_close_matches

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hycluster.errors import SettingsError
from hycluster.gateway.gateway import Gateway


def model_arguments(gateway: Gateway) -> Namespace:
    """Arguments of vLLM's API server: its defaults and the model's own, the settings' ``api``.

    Raises:
        SettingsError: an unknown ``api`` argument.
    """
    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    model = gateway.model
    arguments.model = model.source
    arguments.served_model_name = [model.name]
    arguments.structured_outputs_config = gateway.vllm_config.structured_outputs_config
    for name, value in model.api.items():
        if not hasattr(arguments, name):
            near = get_close_matches(name, vars(arguments), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"models: {model.name}: api.{name}: vLLM's API server has no such argument{hint}")
        setattr(arguments, name, value)
    if reasoning_parser := model.api.get("reasoning_parser"):
        arguments.structured_outputs_config.reasoning_parser = reasoning_parser
    return arguments
