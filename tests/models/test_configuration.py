"""Tencent's configurations, as their checkpoints write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HunYuanMoEV1Config

import hycluster.models as hunyuan_models
from hycluster.models.configuration import (
    HunyuanConfig,
    Rope,
    has_qk_norm,
    head_size,
    layer_shape,
    rope_of,
    share_factor,
)

LARGE: dict[str, Any] = {
    "hidden_size": 6400,
    "intermediate_size": 18304,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "moe_topk": 1,
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": True,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_qk_norm": True,
    "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
}


def test_large() -> None:
    config = HunyuanConfig(**LARGE)
    assert (head_size(config), share_factor(config), has_qk_norm(config)) == (80, 2, True)
    own, sharing = layer_shape(config, 4), layer_shape(config, 5)
    assert (own.kv_layer, own.shares_kv, sharing.kv_layer, sharing.shares_kv) == (4, False, 4, True)
    assert (own.experts, own.top_k, own.expert_ffn, own.shared_ffn) == (16, 1, 18304, 18304)


def test_a_checkpoints_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hunyuan", "eod_token_id": 7, **LARGE}))
    config = HunyuanConfig.from_pretrained(tmp_path)
    assert rope_of(config) == Rope(10000.0, 1000.0, bfloat16_frequencies=False)
    config.save_pretrained(tmp_path / "again")
    again = HunyuanConfig.from_pretrained(tmp_path / "again")
    assert again.to_dict() == config.to_dict()
    assert again.eod_token_id == 7


def test_numbers_may_be_given_by_layer() -> None:
    config = HunyuanConfig(
        num_hidden_layers=2,
        intermediate_size=100,
        moe_intermediate_size=[10, 20],
        num_experts=[4, 8],
        moe_topk=[1, 2],
        num_shared_expert=[1, 2],
        use_mixed_mlp_moe=True,
    )
    shapes = [layer_shape(config, layer) for layer in range(2)]
    assert [(s.experts, s.top_k, s.expert_ffn, s.shared_ffn) for s in shapes] == [(4, 1, 10, 100), (8, 2, 20, 200)]
    with pytest.raises(ValueError, match="has 2 entries; must have one for each of the layers"):
        layer_shape(config, 2)


def test_dense_layers_have_no_shared_expert() -> None:
    config = HunyuanConfig(**LARGE | {"moe_layer_num_skipped": 1})
    first, second = layer_shape(config, 0), layer_shape(config, 1)
    assert (first.is_moe, first.shared_ffn, first.ffn) == (False, 0, 18304)
    assert second.is_moe


def test_more_experts_a_token_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"moe_topk: 17 is above num_experts \(16\) in layer 0"):
        layer_shape(HunyuanConfig(**LARGE | {"moe_topk": 17}), 0)


def test_without_scaling_the_frequencies_are_bfloat16() -> None:
    assert rope_of(HunyuanConfig(rope_theta=500.0)) == Rope(500.0, None, bfloat16_frequencies=True)


@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"type": "yarn", "factor": 4.0}]
)
def test_other_scalings_are_refused(scaling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rope_scaling: type"):
        rope_of(HunyuanConfig(rope_scaling=scaling))


def test_transformers_own_a13b() -> None:
    published = json.loads((Path(hunyuan_models.__file__).parent / "hunyuan_a13b.json").read_text())
    config = HunYuanMoEV1Config(**published)
    shape = layer_shape(config, 1)
    assert (shape.experts, shape.top_k, shape.expert_ffn, shape.shared_ffn) == (64, 8, 3072, 3072)
    assert (head_size(config), share_factor(config), has_qk_norm(config)) == (128, 1, True)
    assert rope_of(config) == Rope(10000.0, 1000.0, bfloat16_frequencies=False)
