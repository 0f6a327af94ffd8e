"""Arguments of vLLM's API server that a model may have: those that act where they are looked for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hycluster.settings.api import ALLOWED, EVERYWHERE, OVER_HTTP
from hycluster.settings.model import Model


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("api_key", r"api\.api_key: is not allowed; it would lock a part"),
        ("host", r"api\.host: is not allowed; set 'http\.host'"),
        ("port", "set 'http.port'"),
        ("root_path", r"api\.root_path: is not allowed"),
        ("ssl_keyfile", "TLS ends in front"),
        ("enable_ssl_refresh", "TLS ends in front"),
        ("allowed_origins", r"set 'http\.allowed_origins'"),
        ("lora_modules", r"set 'models\[\]\.adapters'"),
        ("tool_call_parsr", "did you mean 'tool_call_parser'"),
        ("gpu_memory_utilization", r"set in 'models\[\]\.engine'"),
    ],
)
def test_what_would_act_on_a_part_or_on_nothing_is_refused(name: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Model(name="m", source="s", api={name: "x"})


def test_a_parser_is_said_once() -> None:
    asked: dict[str, Any] = {"reasoning_parser": "qwen3"}
    with pytest.raises(ValidationError, match=r"engine\.reasoning_parser: is set by 'api\.reasoning_parser'"):
        Model(name="m", source="s", api=asked, engine=asked)
    assert Model(name="m", source="s", api=asked).api == asked


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_imported")
def test_all_of_vllms_are_known() -> None:
    """One that an upgrade brings is to be looked at: where does it act?"""
    import dataclasses

    from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs

    refused = {"lora_modules", "tokens_only", "enable_scale_out", "enable_server_load_tracking"}
    fields = {field.name for field in dataclasses.fields(BaseFrontendArgs)}
    of_the_engine = {"reasoning_parser", "reasoning_parser_plugin", "enable_log_requests"}
    assert fields == (ALLOWED - of_the_engine) | refused
    assert not EVERYWHERE & OVER_HTTP
