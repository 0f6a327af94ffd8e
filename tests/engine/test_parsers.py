"""Parsers of tool calls and reasoning that nobody has to name: by what a checkpoint says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hycluster.engine.arguments import engine_arguments
from hycluster.engine.names import _PARSERS, _keys, check_names
from hycluster.engine.parsers import REASONING, TOOL_CALLS, parsers_of, with_parsers
from hycluster.errors import SettingsError
from hycluster.settings.api import in_our_words
from hycluster.settings.model import Model

# What the published templates of each family have in them, and by its lack tell others.
HERMES = '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>'
THINKS = "{%- if enable_thinking is defined and enable_thinking is false %}<think>\\n\\n</think>"
DEEPSEEK = "<\uff5cAssistant\uff5c><\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>"
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}'


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        pytest.param("qwen2", HERMES, "hermes", None, id="Qwen2.5"),
        pytest.param("qwen3", HERMES + THINKS, "hermes", "qwen3", id="Qwen3"),
        pytest.param("qwen3_moe", HERMES, "hermes", None, id="Qwen3-Instruct-2507"),
        pytest.param("qwen3_moe", HERMES + "assistant\\n<think>\\n", "hermes", "qwen3", id="Qwen3-Thinking-2507"),
        pytest.param("qwen3_moe", "<tool_call>\n<function=f>\n<parameter=p>", "qwen3_coder", None, id="Qwen3-Coder"),
        pytest.param("qwen2", HERMES + "assistant\\n<think>\\n", "hermes", "deepseek_r1", id="QwQ"),
        pytest.param("llama", HERMES, "hermes", None, id="Hermes 3"),
        pytest.param("llama", LLAMA + "Environment: ipython", "llama3_json", None, id="Llama 3.1"),
        pytest.param("llama", "<|start_header_id|>", None, None, id="Llama 3"),
        pytest.param("llama4", LLAMA + "ipython<|python_start|>", "llama4_json", None, id="Llama 4"),
        pytest.param("llama4", "[func(a=1)]<|python_start|>", "llama4_pythonic", None, id="Llama 4, pythonic"),
        pytest.param("deepseek_v3", "<\uff5cAssistant\uff5c>", None, None, id="DeepSeek V3 of 2024"),
        pytest.param("deepseek_v3", DEEPSEEK + "```json", "deepseek_v3", None, id="DeepSeek V3-0324"),
        pytest.param("deepseek_v3", DEEPSEEK + "```json</think>", "deepseek_v3", "deepseek_r1", id="DeepSeek R1"),
        pytest.param(
            "deepseek_v3", DEEPSEEK + "thinking is defined</think>", "deepseek_v31", "deepseek_v3", id="DeepSeek V3.1"
        ),
        pytest.param("qwen2", "<\uff5cAssistant\uff5c><think>\\n</think>", None, "deepseek_r1", id="R1 distilled"),
        pytest.param("deepseek_v32", None, "deepseek_v32", "deepseek_v3", id="DeepSeek V3.2"),
        pytest.param("mistral", "[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", None, id="Mistral"),
        pytest.param("mistral", "[TOOL_CALLS][THINK]", "mistral", "mistral", id="Magistral"),
        pytest.param("gpt_oss", "<|channel|>", "openai", "openai_gptoss", id="gpt-oss"),
        pytest.param("glm4_moe", "<tool_call><arg_key>" + THINKS, "glm45", "glm45", id="GLM-4.5"),
        pytest.param("kimi_k2", "<|tool_calls_section_begin|>", "kimi_k2", None, id="Kimi K2"),
        pytest.param("kimi_k2", "<|tool_calls_section_begin|><think>", "kimi_k2", "kimi_k2", id="Kimi K2 Thinking"),
        pytest.param("minimax_m2", "<minimax:tool_call><think>", "minimax_m2", "minimax_m2", id="MiniMax M2"),
        pytest.param("seed_oss", "<seed:tool_call><seed:think>", "seed_oss", "seed_oss", id="Seed-OSS"),
        pytest.param("hunyuan_v1_moe", "<tool_calls>[" + THINKS, "hunyuan_a13b", "hunyuan_a13b", id="Hunyuan A13B"),
        pytest.param("hunyuan_v1_dense", "<tool_calls>[" + THINKS, "hunyuan_a13b", None, id="Hunyuan, dense"),
        pytest.param("hunyuan", "<|startoftext|>", None, None, id="Hunyuan-Large"),
        pytest.param("granite", "<|tool_call|>Here is my thought process", "granite", "granite", id="Granite 3"),
        pytest.param("granitemoehybrid", HERMES, "granite4", None, id="Granite 4"),
        pytest.param("ernie4_5_moe", HERMES, "ernie45", None, id="Ernie 4.5"),
        pytest.param("llama", None, None, None, id="no template"),
    ],
)
def test_a_family_is_known_by_what_it_is_told_to_write(
    model_type: str, template: str | None, tools: str | None, reasoning: str | None
) -> None:
    expected = {"tool_call_parser": tools, "reasoning_parser": reasoning}
    assert parsers_of(model_type, template) == {name: parser for name, parser in expected.items() if parser}


@pytest.mark.parametrize(("kind", "forms"), [("tool_call_parser", TOOL_CALLS), ("reasoning_parser", REASONING)])
def test_vllm_has_all_of_them(kind: str, forms: Any) -> None:
    file, table, _ = _PARSERS[kind]
    registered = _keys(file, table)
    assert len(registered) > 30
    assert {form.parser for form in forms} <= set(registered)


def checkpoint(folder: Path, template: str | None = HERMES + THINKS, model_type: str = "qwen3", **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | more))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return str(folder)


def resolved(folder: str, **fields: Any) -> dict[str, Any]:
    return with_parsers(Model(name="m", source="s", **fields), folder).api


def test_what_is_not_said_is_looked_up(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    both = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    assert resolved(folder) == resolved(folder, api={"tool_call_parser": "auto"}) == both
    said = {"tool_call_parser": "qwen3_xml", "response_role": "a"}
    assert resolved(folder, api=said) == said | {"reasoning_parser": "qwen3"}
    # null is none.
    assert resolved(folder, api={"tool_call_parser": None, "reasoning_parser": None}) == {}
    assert resolved(folder, api={"tool_call_parser": "hf"}) == {"tool_call_parser": "hf"}
    assert "reasoning_parser" not in resolved(folder, engine={"reasoning_parser": "qwen3"})
    assert resolved(folder, simulated={"decode_token_s": 0.01, "max_model_len": 9, "vocab_size": 9}) == {}


def test_auto_is_refused_where_nothing_is_known(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", None, "llama")
    assert resolved(folder) == {}
    with pytest.raises(SettingsError, match=r"^models: m: api\.tool_call_parser: 'auto' is not allowed .*'llama'"):
        resolved(folder, api={"tool_call_parser": "auto"})
    # A parser plug-in's own name is not looked up.
    check_names(Model(name="m", source="s", api={"tool_call_parser": "auto", "reasoning_parser": "auto"}))


def test_where_the_template_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", None, "x", text_config={"model_type": "y"})
    assert resolved(folder, api={"chat_template": "{{ messages }}" + HERMES})["tool_call_parser"] == "hermes"
    given = tmp_path / "given.jinja"
    given.write_text(HERMES)
    assert resolved(folder, api={"chat_template": str(given)})["tool_call_parser"] == "hermes"
    assert resolved(folder) == {}
    (tmp_path / "m" / "tekken.json").write_text("{}")
    assert resolved(folder) == {"tool_call_parser": "mistral"}
    (tmp_path / "m" / "chat_template.jinja").write_text(HERMES)
    assert resolved(folder) == {"tool_call_parser": "hermes"}
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "[TOOL_CALLS]"}]
    several = checkpoint(tmp_path / "n", named)  # type: ignore[arg-type]
    assert resolved(several) == {"tool_call_parser": "mistral"}
    inner = checkpoint(tmp_path / "i", "x", None, text_config={"model_type": "gpt_oss"})  # type: ignore[arg-type]
    assert resolved(inner)["tool_call_parser"] == "openai"


def test_the_engine_hears_of_the_reasoning(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    model = with_parsers(Model(name="m", source="s"), folder)
    assert engine_arguments(model, folder)["reasoning_parser"] == "qwen3"


def test_errors_name_settings() -> None:
    said = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    assert in_our_words(said) == (
        '"auto" tool choice requires models[].api.enable_auto_tool_choice and models[].api.tool_call_parser to be set'
    )
    assert in_our_words("set --reasoning-config, a -- b, --x") == "set models[].engine.reasoning_config, a -- b, --x"
