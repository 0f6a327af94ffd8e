"""What vLLM's API is told of a model; by a stand-in for vLLM's config, as far as it is looked at."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.settings.model import Model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.usefixtures("vllm_imported")]


def arguments(**api: Any) -> Namespace:
    from hycluster.gateway.api_arguments import model_arguments

    config: Any = SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser=""))
    return model_arguments(Model(name="m", source="s", api=api), config)


def test_a_tool_parser_is_enough_for_tools() -> None:
    assert arguments(tool_call_parser="hermes").enable_auto_tool_choice
    assert not arguments(tool_call_parser="hermes", enable_auto_tool_choice=False).enable_auto_tool_choice
    assert not arguments().enable_auto_tool_choice


def test_a_tool_parser_that_is_none() -> None:
    with pytest.raises(SettingsError, match=r"^models: m: api\.tool_call_parser: .*'herms'; did you mean 'hermes'"):
        arguments(tool_call_parser="herms")


def test_a_template_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"^models: m: api\.chat_template: .*nowhere"):
        arguments(chat_template="nowhere.jinja")


def test_models_do_not_share_what_they_are_told() -> None:
    arguments(tool_call_parser="hermes").allowed_origins.append("https://one")
    assert arguments().tool_call_parser is None
    assert "https://one" not in arguments().allowed_origins
