"""Every kind of model that is known, against transformers' own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from hycluster.errors import SettingsError
from hycluster.models.tiny import TinyShape, config_of, weights_of
from hycluster.planning.architecture import parameters
from hycluster.planning.families import FAMILIES, architecture, read_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 300,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **EXPERTS,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
# hunyuan is Tencent's own code: counted against its checkpoints below. kimi_k2 is deepseek_v3.
OF_TRANSFORMERS: dict[str, list[dict[str, Any]]] = {
    **{kind: [{}] for kind in FAMILIES if kind not in ("hunyuan", "kimi_k2")},
    "hunyuan_v1_moe": [{"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1}],
    "deepseek_v2": [LATENT, {**LATENT, "q_lora_rank": None, "tie_word_embeddings": True}],
    "deepseek_v3": [LATENT, {**LATENT, "attention_bias": True}],
    "ernie4_5": [{}, {"use_bias": True}],
    "glm4": [{"attention_bias": True}, {}],
    "glm4_moe": [
        {**EXPERTS, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": norm}
        for norm in (True, False)
    ],
    "gpt_oss": [{"num_local_experts": 4, "num_experts_per_tok": 2}],
    "granitemoe": [{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}],
    "granite": [{"head_dim": None}],
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "minimax_m2": [{"num_local_experts": 4, "num_experts_per_tok": 2}],
    "mixtral": [{"num_local_experts": 4, "num_experts_per_tok": 2}],
    "olmo2": [{"head_dim": None}],
    "olmo3": [{"head_dim": None}],
    "olmoe": [{"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None}],
    "phi3": [{"head_dim": None}],
    "qwen2": [{"head_dim": None}],
    "qwen2_moe": [{**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 40, "head_dim": None}],
    "qwen3_moe": [{**EXPERTS, "num_experts": 6, "decoder_sparse_step": 2}],
    "seed_oss": [{}, {"attention_out_bias": True, "mlp_bias": True}],
}


def of_transformers(kind: str, change: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        fields = {name: value for name, value in (SMALL | change).items() if value is not None or name != "head_dim"}
        return transformers.AutoConfig.for_model(kind, **fields)


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, changes in OF_TRANSFORMERS.items() for change in changes]
)
def test_counts_as_transformers_builds_them(kind: str, change: dict[str, Any]) -> None:
    config = of_transformers(kind, change)
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = parameters(architecture(config.to_dict()))
    assert counted.total == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    "shape",
    [
        TinyShape(),
        TinyShape(layers=5, cla_share_factor=3, head_size=64, experts=4, topk=2, shared_experts=2),
        TinyShape(layers=2, cla=False, experts=1, shared_experts=0, attention_bias=True, tied_embeddings=False),
        TinyShape(layers=2, architecture="hunyuan-a13b", cla=False, topk=3, shared_experts=0),
    ],
)
def test_counts_what_a_checkpoint_of_tencents_layout_holds(shape: TinyShape) -> None:
    held = sum(weight.numel() for weight in weights_of(shape).values())
    assert parameters(architecture(config_of(shape))).total == held


@pytest.mark.parametrize(
    ("kind", "change", "windows"),
    [
        ("mistral", {"sliding_window": 8}, [8, 8, 8]),
        ("mistral", {"sliding_window": None}, [None, None, None]),
        ("llama", {"sliding_window": 8}, [None, None, None]),
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, [8, None, 8]),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, None]),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, [None, None, None]),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": True}, [None, 8, 8]),
        (
            "olmo3",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            [None, 8, None],
        ),
    ],
)
def test_which_layers_have_a_window(kind: str, change: dict[str, Any], windows: list[int | None]) -> None:
    model = architecture(SMALL | {"model_type": kind} | change)
    assert [layer.window for layer in model.layers] == windows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "bert"}, r"^model_type: 'bert' is not known; must be one of hunyuan, "),
        ({"model_type": None}, r"^model_type: None is not known"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            r"^model_type: 'gemma3' has more than a text model; .* under text_config \(gemma3_text\)",
        ),
        ({"num_hidden_layers": None}, r"^num_hidden_layers: None is not allowed; must be a whole number"),
        ({"hidden_size": "64"}, r"^hidden_size: '64' is not allowed"),
        ({"vocab_size": 0}, r"^vocab_size: 0 is not allowed; must be a whole number of at least 1"),
        ({"layer_types": ["linear_attention"] * 3}, r"^layer_types: 'linear_attention' is not known"),
        ({"layer_types": ["full_attention"]}, r"^layer_types: None is not known"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        architecture(SMALL | {"model_type": "qwen3"} | change)


def test_a_configuration_is_read_from_its_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == SMALL


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON: "), ("[]", "must be a model's config.json, an object")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=says):
        read_config(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json: no such file; must be a model's config\.json"):
        read_config(tmp_path)
