"""Arguments of vLLM's API server that a model may have: those that act where they are looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hycluster.engine.names import _API, _fields
from hycluster.errors import SettingsError
from hycluster.settings.api import _INSTEAD, ALLOWED, EVERYWHERE, OVER_HTTP, check_environment, instead_of
from hycluster.settings.model import Model
from hycluster.settings.read import load_settings


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("api_key", r"api\.api_key: is not allowed; it would lock a part"),
        ("host", r"api\.host: is not allowed; set 'http\.host'"),
        ("port", "set 'http.port'"),
        ("root_path", r"api\.root_path: is not allowed"),
        ("ssl_keyfile", r"set 'auth\.tls'"),
        ("enable_ssl_refresh", r"set 'auth\.tls'"),
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


def test_all_of_vllms_are_known() -> None:
    """One that an upgrade brings is to be looked at: where does it act?"""
    of_the_engine = {"reasoning_parser", "reasoning_parser_plugin", "enable_log_requests"}
    fields = set(_fields(_API, ("BaseFrontendArgs", "FrontendArgs")))
    assert len(fields) > 50
    refused = {name for name in fields if instead_of(name)}
    assert fields - refused == ALLOWED - of_the_engine
    assert not EVERYWHERE & OVER_HTTP
    assert set(_INSTEAD) <= fields | {"served_model_name"}


def test_a_key_in_the_environment_locks_no_part_of_it() -> None:
    check_environment({"VLLM_API_KEY": "", "OTHER": "x"})
    with pytest.raises(SettingsError, match=r"^VLLM_API_KEY: must not be set in the environment; it would lock a part"):
        check_environment({"VLLM_API_KEY": "secret"})


def test_files_lie_beside_the_settings(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    settings = tmp_path / "settings.yaml"
    literal = "{{ messages }}\n" * 2000
    models = [
        {"name": name, "source": "s", "api": {"chat_template": given}}
        for name, given in (("a", "chat.jinja"), ("b", "/elsewhere.jinja"), ("c", literal), ("d", "{{ x }}"))
    ]
    settings.write_text(json.dumps({"models": models}))
    read = [model.api["chat_template"] for model in load_settings(settings).models]
    assert read == [str(tmp_path / "chat.jinja"), "/elsewhere.jinja", literal, "{{ x }}"]
