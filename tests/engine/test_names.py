"""Typos in engine and API arguments, by vLLM's source; the last test holds that against vLLM itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hycluster.engine import names
from hycluster.errors import SettingsError
from hycluster.settings.model import Model
from hycluster.settings.read import load_settings
from tests.planning.configs import ROOT
from tests.vllm_forks import VllmForks


def check(**fields: Any) -> None:
    names.check_names(Model(name="m", source="/folder", **fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"engine": {"max_modle_len": 1}}, r"engine\.max_modle_len: .*; did you mean 'max_model_len'\?"),
        ({"engine": {"maxNumSeqs": 1}}, r"did you mean 'max_num_seqs'\?"),
        ({"engine": {"colour": 1}}, r"models: m: engine\.colour: vLLM's engine has no such argument$"),
        ({"engine": {"max_num_seqs": "many"}}, r"engine\.max_num_seqs: 'many' is not allowed; must be of type int"),
        ({"engine": {"enforce_eager": "yes please"}}, r"engine\.enforce_eager: .* must be of type bool"),
        ({"engine": {"max_num_seqs": True}}, r"engine\.max_num_seqs: True is not allowed"),
        ({"engine": {"kv_cache_dtype": "fp8_e4m4"}}, r"'fp8_e4m4' is not allowed; did you mean 'fp8_e4m3'\?"),
        ({"api": {"tool_call_parser": "hermse"}}, r"'hermse' is no parser of vLLM's; did you mean 'hermes'\?"),
        ({"api": {"reasoning_parser": "qwen"}}, r"'qwen' is no parser of vLLM's; did you mean 'qwen3'\?"),
    ],
)  # fmt: skip
def test_near_misses_are_told(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        check(**fields)


def test_what_vllm_takes_passes() -> None:
    check(
        engine={
            "max_model_len": None,
            "gpu_memory_utilization": 1,
            "kv_cache_dtype": "fp8",
            "dtype": "bfloat16",
            "compilation_config": {"level": 3},
            "speculative_config": {"method": "ngram"},
            "distributed_executor_backend": "mp",
        },
        api={"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "chat_template": "x"},
    )
    check(api={"tool_call_parser": "mine", "tool_parser_plugin": "/mine.py"})


@pytest.mark.parametrize("path", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda path: path.name)
def test_the_deployments_have_no_typos(path: Any) -> None:
    for model in load_settings(path).models:
        names.check_names(model)


def test_without_vllm_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "vllm_source", lambda: None)
    check(engine={"max_modle_len": 1})


@pytest.mark.slow
def test_what_is_read_is_what_vllm_has(vllm_forks: VllmForks, tmp_path: Path) -> None:
    """vLLM 0.32.0's own list, in a process of its own: its import is for good."""
    script = tmp_path / "compared.py"
    script.write_text("""
import dataclasses
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.tool_parsers import ToolParserManager
from vllm.reasoning import ReasoningParserManager
from hycluster.engine import names
assert set(names._fields(names._ENGINE, ("EngineArgs", "AsyncEngineArgs"))) == {
    field.name for field in dataclasses.fields(AsyncEngineArgs)}
assert set(names._fields(names._API, ("BaseFrontendArgs", "FrontendArgs"))) == {
    field.name for field in dataclasses.fields(FrontendArgs)}
for kind, manager in (("tool_call_parser", ToolParserManager), ("reasoning_parser", ReasoningParserManager)):
    file, table, _ = names._PARSERS[kind]
    assert set(manager.list_registered()) == set(names._keys(file, table)), kind
""")
    vllm_forks.run(script, timeout_s=240)
