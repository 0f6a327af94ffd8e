"""Which of vLLM's parsers reads a model's tool calls and reasoning, for those whose checkpoint says in which form it
writes them.

What tells is the chat template: in it stands how the model is told to call tools, and where its reasoning begins. A
``model_type`` alone does not: Qwen3 and Qwen3-Coder share one and write differently, and an Instruct model of a family
that reasons does not. Where the model has a form without a template (gpt-oss, DeepSeek V3.2) it is the type.
The names are vLLM 0.32.0's, each as its documentation of tool calling and of reasoning names the families.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hycluster.errors import SettingsError, shown
from hycluster.settings.model import Model

logger = logging.getLogger(__name__)

AUTO = "auto"
HF = "hf"


@dataclass(frozen=True, slots=True)
class WrittenForm:
    """How a family's checkpoints are known.

    Attributes:
        parser: vLLM's name of what reads the form.
        types: of these ``model_type`` begins with one; empty is any.
        has: all of these are in the chat template; empty needs none.
        has_not: none of these is.
    """

    parser: str
    types: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    has_not: tuple[str, ...] = ()

    def fits(self, model_type: str, template: str | None) -> bool:
        if self.types and not model_type.startswith(self.types):
            return False
        if not self.has:
            return True
        if template is None:
            return False
        return all(mark in template for mark in self.has) and not any(mark in template for mark in self.has_not)


# The first that fits counts.
TOOL_CALLS = (
    WrittenForm("openai", ("gpt_oss",)),
    WrittenForm("deepseek_v32", ("deepseek_v32",)),
    WrittenForm("deepseek_v41", ("deepseek_v41",)),
    WrittenForm("deepseek_v4", ("deepseek_v4",)),
    WrittenForm("kimi_k3", ("kimi_k3",)),
    WrittenForm("hy_v3", ("hy_v3",)),
    WrittenForm("hy_v4", ("hy_v4",)),
    WrittenForm("hunyuan_a13b", ("hunyuan",), ("<tool_calls>",)),
    WrittenForm("kimi_k2", (), ("<|tool_calls_section_begin|>",)),
    # DeepSeek R1 and V3 put the arguments into a block of code, V3.1 does not.
    WrittenForm("deepseek_v3", (), ("<\uff5ctool▁calls▁begin\uff5c>", "```json")),
    WrittenForm("deepseek_v31", (), ("<\uff5ctool▁calls▁begin\uff5c>",)),
    WrittenForm("minimax_m2", (), ("<minimax:tool_call>",)),
    WrittenForm("seed_oss", (), ("<seed:tool_call>",)),
    WrittenForm("glm45", ("glm",), ("<tool_call>", "<arg_key>")),
    WrittenForm("qwen3_coder", (), ("<tool_call>", "<function=")),
    WrittenForm("granite4", ("granitemoehybrid",), ("<tool_call>",)),
    WrittenForm("granite", ("granite",), ("<|tool_call|>",)),
    WrittenForm("ernie45", ("ernie4_5",), ("<tool_call>",)),
    WrittenForm("hermes", (), ("<tool_call>", '"arguments"')),
    WrittenForm("llama4_json", ("llama4",), ('"parameters": dictionary of argument name and its value',)),
    WrittenForm("llama4_pythonic", ("llama4",), ("<|python_start|>",)),
    WrittenForm("llama3_json", ("llama",), ('"parameters": dictionary of argument name and its value', "ipython")),
    WrittenForm("mistral", (), ("[TOOL_CALLS]",)),
)
REASONING = (
    WrittenForm("openai_gptoss", ("gpt_oss",)),
    WrittenForm("deepseek_v3", ("deepseek_v32",)),
    WrittenForm("deepseek_v41", ("deepseek_v41",)),
    WrittenForm("deepseek_v4", ("deepseek_v4",)),
    WrittenForm("kimi_k3", ("kimi_k3",)),
    WrittenForm("hy_v3", ("hy_v3",)),
    WrittenForm("hy_v4", ("hy_v4",)),
    # Its parser knows ids of its tokenizer; the dense ones have another.
    WrittenForm("hunyuan_a13b", ("hunyuan_v1_moe",), ("<think>", "enable_thinking")),
    WrittenForm("kimi_k2", (), ("<|tool_calls_section_begin|>", "<think>")),
    WrittenForm("minimax_m2", (), ("<minimax:tool_call>", "<think>")),
    WrittenForm("seed_oss", (), ("<seed:think>",)),
    WrittenForm("glm45", ("glm",), ("<think>", "enable_thinking")),
    # V3.1 reasons if it is asked to; R1 and what is distilled from it always does.
    WrittenForm("deepseek_v3", (), ("<\uff5cAssistant\uff5c>", "</think>", "thinking is defined")),
    WrittenForm("deepseek_r1", (), ("<\uff5cAssistant\uff5c>", "</think>")),
    WrittenForm("qwen3", ("qwen3",), ("<think>", "enable_thinking")),
    # What has no such switch opens the reasoning itself, or does not reason.
    WrittenForm("qwen3", ("qwen3",), ("assistant\\n<think>",)),
    WrittenForm("deepseek_r1", ("qwen2",), ("assistant\\n<think>",)),
    WrittenForm("granite", ("granite",), ("Here is my thought process",)),
    WrittenForm("mistral", (), ("[THINK]",)),
)


def parsers_of(model_type: str, template: str | None) -> dict[str, str]:
    """The ``api`` settings that a checkpoint of this kind takes; without those for which nothing is known."""
    found: dict[str, str] = {}
    for name, forms in (("tool_call_parser", TOOL_CALLS), ("reasoning_parser", REASONING)):
        for form in forms:
            if form.fits(model_type, template):
                found[name] = form.parser
                break
    return found


def with_parsers(model: Model, model_path: str) -> Model:
    """The model with its parsers by name: what is not set, or ``auto``, is looked up; null is none.

    Raises:
        SettingsError: ``auto`` is asked for, and nothing is known of the model.
    """
    names = ("tool_call_parser", "reasoning_parser")
    open_ones = [name for name in names if model.api.get(name, AUTO) == AUTO]
    if HF in (model.api.get(name) for name in names):
        # It reads both, by a template of its own, and stands no other beside it.
        open_ones = [name for name in open_ones if name in model.api]
    if "reasoning_parser" in model.engine and "reasoning_parser" in open_ones:
        open_ones.remove("reasoning_parser")
    if not open_ones or model.simulated is not None or model.engine.get("skip_tokenizer_init"):
        given = {name: value for name, value in model.api.items() if name not in names or value not in (None, AUTO)}
        return model if given == model.api else model.model_copy(update={"api": given})
    model_type = _model_type(model, model_path)
    known = parsers_of(model_type, _template(model, model_path))
    api = {name: value for name, value in model.api.items() if name not in open_ones and value is not None}
    for name in open_ones:
        if name in known:
            api[name] = known[name]
            if name not in model.api:
                logger.info("models: %s: api.%s: %s, by its chat template or type", model.name, name, known[name])
        elif name in model.api:
            raise SettingsError(
                f"models: {model.name}: api.{name}: 'auto' is not allowed for a model of type {shown(model_type)}, of "
                "which no form is known; name one of vLLM's, or null for none"
            )
    return model.model_copy(update={"api": api})


def _model_type(model: Model, model_path: str) -> str:
    config = _json(model, model_path, "config.json")
    # Of a model of several parts, what writes.
    inner = config.get("text_config")
    kinds = [c.get("model_type") for c in (config, inner) if isinstance(c, Mapping)]
    return next((kind for kind in kinds if isinstance(kind, str)), "")


def _template(model: Model, model_path: str) -> str | None:
    """The chat template that requests are put into; None if there is none, or it can't be read here."""
    if (given := model.api.get("chat_template")) is not None:
        return (
            Path(given).read_text(encoding="utf-8") if "{" not in str(given) and Path(given).is_file() else str(given)
        )
    for path in _files(model, model_path, "chat_template.jinja"):
        return path.read_text(encoding="utf-8")
    named = _json(model, model_path, "tokenizer_config.json").get("chat_template")
    if isinstance(named, list):
        # Several by their names; that for tools is taken where there are tools.
        texts = {each.get("name"): each.get("template") for each in named if isinstance(each, Mapping)}
        named = texts.get("tool_use") or texts.get("default")
    if named is None and any(_files(model, model_path, "tekken.json")):
        # Mistral's own tokenizer is its template.
        return "[TOOL_CALLS]"
    return named if isinstance(named, str) else None


def _json(model: Model, model_path: str, name: str) -> dict[str, Any]:
    for path in _files(model, model_path, name):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            # Whoever loads the model says so.
            continue
        if isinstance(found, dict):
            return found
    return {}


def _files(model: Model, model_path: str, name: str) -> Iterator[Path]:
    """A file of the checkpoint, if it is there: in a folder, or of a hub id in its cache, or fetched into that."""
    if Path(model_path).is_dir():
        path = Path(model_path) / name
        if path.is_file():
            yield path
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield Path(hf_hub_download(model_path, name, revision=model.engine.get("revision")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        logger.debug("models: %s: %s: %s", model.name, name, error)
