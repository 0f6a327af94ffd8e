"""From a Hugging Face ``config.json`` to a shape.

A configuration does not say all that its model's code does: biases, norms, which layers have experts or a window. That
is told here by ``model_type``; ``tests/planning/test_families.py`` holds each against transformers' own model. What is
not known is refused, since a count that leaves something out is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hycluster.errors import SettingsError, shown
from hycluster.planning.architecture import Architecture, Extras, Latent, Layer

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """What the code of a ``model_type`` does and its configuration does not say.

    Attributes:
        bias: the field that gives all projections of attention a bias; None where none can.
        output_bias: the one for the output projection, if it is another; "" where it has none.
        slides: which layers have a window where ``sliding_window`` is set and ``layer_types`` is not: ``all``, all but
            every n-th, or those behind ``max_window_layers`` where ``use_sliding_window`` says so (``switched``).
    """

    qk_norm: Literal["none", "head", "full"] = "none"
    bias: str | None = None
    output_bias: str | None = None
    biased: bool = False
    mlp_bias: str | None = None
    norms: int = 2
    tied: bool = False
    slides: Literal["all", "switched"] | int | None = None
    latent: bool = False
    routed_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False


_LLAMA = Family(bias="attention_bias", mlp_bias="mlp_bias")
_FULL_NORM = Family(bias="attention_bias", qk_norm="full")
_LATENT = Family(bias="attention_bias", latent=True)
_HUNYUAN = Family(bias="attention_bias", qk_norm="none")

FAMILIES: dict[str, Family] = {
    "hunyuan": _HUNYUAN,
    "hunyuan_v1_moe": Family(bias="attention_bias", qk_norm="head"),
    "hunyuan_v1_dense": Family(bias="attention_bias", qk_norm="head"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "ernie4_5": Family(bias="use_bias", mlp_bias="use_bias"),
    "gemma": Family(bias="attention_bias", tied=True),
    "gemma2": Family(bias="attention_bias", tied=True, norms=4, slides=2),
    "gemma3_text": Family(bias="attention_bias", tied=True, norms=4, qk_norm="head", slides=6),
    "glm4": Family(bias="attention_bias", output_bias="", norms=4),
    "glm4_moe": Family(bias="attention_bias", output_bias=""),
    "gpt_oss": Family(bias="attention_bias", biased=True, routed_bias=True, sinks=True, slides=2),
    "granite": _LLAMA,
    "granitemoe": Family(bias="attention_bias"),
    # The text model of Kimi K2 is DeepSeek-V3's in other sizes.
    "kimi_k2": _LATENT,
    "llama": _LLAMA,
    "minimax_m2": Family(qk_norm="full"),
    "ministral": Family(slides="all"),
    "mistral": Family(slides="all"),
    "mixtral": Family(slides="all"),
    "olmo2": _FULL_NORM,
    "olmo3": Family(bias="attention_bias", qk_norm="full", slides=4),
    "olmoe": _FULL_NORM,
    "phi3": Family(slides="all"),
    "qwen2": Family(bias="qkv_bias", output_bias="", biased=True, slides="switched"),
    "qwen2_moe": Family(bias="qkv_bias", output_bias="", biased=True, shared_gate=True, slides="switched"),
    "qwen3": Family(bias="attention_bias", qk_norm="head", slides="switched"),
    "qwen3_moe": Family(bias="attention_bias", qk_norm="head", slides="switched"),
    "seed_oss": Family(bias="attention_bias", output_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": _LLAMA,
}


def read_config(path: str | Path) -> dict[str, Any]:
    """A model's configuration: a ``config.json``, or a folder that has one.

    Raises:
        SettingsError: there is none, or it is no JSON object.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; must be a model's config.json, or the folder that has it") from None
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{path}: is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{path}: must be a model's config.json, an object, not {type(config).__name__}")
    return config


def architecture(config: Config) -> Architecture:
    """The shape behind a ``config.json``.

    Raises:
        SettingsError: a kind of model that is not known here, or a field that is missing or wrong.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        if isinstance(text := config.get("text_config"), Mapping) and text.get("model_type") in FAMILIES:
            raise SettingsError(
                f"model_type: {shown(kind)} has more than a text model; only text models are counted: give a file with"
                f" what is under text_config ({text['model_type']})"
            )
        raise SettingsError(f"model_type: {shown(kind)} is not known; must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    count = _number(config, "num_hidden_layers")
    layer: Callable[[Config, int], Layer] = _hunyuan_layer if kind in ("hunyuan", "hunyuan_v1_moe") else _layer
    return Architecture(
        kind=kind,
        hidden=hidden,
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads", heads),
        head_size=_number(config, "head_dim", _number(config, "attention_head_dim", max(1, hidden // heads))),
        vocabulary=_number(config, "vocab_size"),
        tied=bool(_given(config, "tie_word_embeddings", family.tied)),
        positions=_number(config, "max_position_embeddings", 0, least=0),
        layers=tuple(layer(config, index) for index in range(count)),
        latent=_latent(config) if family.latent else None,
        extras=_extras(config, family),
    )


def _extras(config: Config, family: Family) -> Extras:
    bias = family.bias is not None and bool(_given(config, family.bias, family.biased))
    output = bias if family.output_bias is None else bool(config.get(family.output_bias or "-"))
    qk_norm = family.qk_norm
    if "use_qk_norm" in config and qk_norm != "full":
        qk_norm = "head" if config["use_qk_norm"] else "none"
    return Extras(
        qk_norm=qk_norm,
        qkv_bias=bias,
        o_bias=output,
        mlp_bias=family.mlp_bias is not None and bool(config.get(family.mlp_bias)),
        expert_bias=family.routed_bias,
        router_bias=family.routed_bias,
        shared_gate=family.shared_gate,
        sinks=family.sinks,
        norms=family.norms,
    )


def _given(config: Config, name: str, default: Any) -> Any:
    value = config.get(name)
    return default if value is None else value


def _number(config: Config, name: str, default: int | None = None, layer: int | None = None, least: int = 1) -> int:
    value = config.get(name)
    if isinstance(value, list) and layer is not None and layer < len(value):
        value = value[layer]
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SettingsError(f"{name}: {shown(value)} is not allowed; must be a whole number of at least {least}")
    return value


def _latent(config: Config) -> Latent:
    return Latent(
        query_rank=_number(config, "q_lora_rank", 0, least=0),
        kv_rank=_number(config, "kv_lora_rank"),
        rope_size=_number(config, "qk_rope_head_dim"),
        key_size=_number(config, "qk_nope_head_dim"),
        value_size=_number(config, "v_head_dim"),
    )


def _hunyuan_layer(config: Config, index: int) -> Layer:
    sharing = _number(config, "cla_share_factor", 1) if config.get("use_cla") else 1
    ffn = _number(config, "intermediate_size", layer=index)
    dense = index < _number(config, "moe_layer_num_skipped", 0, least=0)
    experts = 0 if dense else _number(config, "num_experts", 1, index)
    routed = experts > 1
    # transformers' own A13B configuration has no such switch: its shared expert is always there.
    shared = routed and config.get("use_mixed_mlp_moe", config["model_type"] == "hunyuan_v1_moe")
    return Layer(
        caches_kv=index % sharing == 0,
        experts=experts if routed else 0,
        top_k=_number(config, "moe_topk", 1, index) if routed else 0,
        ffn=_number(config, "moe_intermediate_size", ffn, index) if routed else ffn,
        shared_ffn=ffn * _number(config, "num_shared_expert", 1, index) if shared else 0,
    )


def _layer(config: Config, index: int) -> Layer:
    ffn, window = _number(config, "intermediate_size"), _window(config, index)
    # Files say one or another.
    experts = next((_number(config, name, least=0) for name in _EXPERTS if config.get(name) is not None), 0)
    if not experts or _is_dense(config, index):
        return Layer(caches_kv=True, experts=0, top_k=0, ffn=ffn, shared_ffn=0, window=window)
    routed = _number(config, "moe_intermediate_size", ffn)
    shared = _number(config, "n_shared_experts", 0, least=0) * routed
    return Layer(
        caches_kv=True,
        experts=experts,
        top_k=_number(config, "num_experts_per_tok"),
        ffn=routed,
        shared_ffn=shared or _number(config, "shared_expert_intermediate_size", 0, least=0),
        window=window,
    )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _is_dense(config: Config, index: int) -> bool:
    return (
        index < _number(config, "first_k_dense_replace", 0, least=0)
        or index in (config.get("mlp_only_layers") or ())
        or (index + 1) % _number(config, "decoder_sparse_step", 1) != 0
        or index % _number(config, "moe_layer_freq", 1) != 0
    )


def _window(config: Config, index: int) -> int | None:
    """Tokens that a layer's attention reaches back; None for all.

    Raises:
        SettingsError: a kind of attention that is not known.
    """
    slides = FAMILIES[config["model_type"]].slides
    if (types := config.get("layer_types")) is not None:
        kind = types[index] if isinstance(types, list) and index < len(types) else None
        if kind not in ("full_attention", "sliding_attention"):
            raise SettingsError(
                f"layer_types: {shown(kind)} is not known; must be one of full_attention, sliding_attention"
            )
        sliding = kind == "sliding_attention"
    elif slides == "switched":
        sliding = bool(config.get("use_sliding_window")) and index >= _number(config, "max_window_layers", 0, least=0)
    elif isinstance(slides, int):
        sliding = (index + 1) % _number(config, "sliding_window_pattern", slides) != 0
    else:
        sliding = slides == "all"
    return _number(config, "sliding_window") if sliding and config.get("sliding_window") is not None else None
