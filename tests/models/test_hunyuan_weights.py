"""From Tencent's fused layout to the separate one, by row numbers that say where each row belongs."""

from __future__ import annotations

import pytest
import torch

from hycluster.models.configuration import HunyuanConfig
from hycluster.models.hunyuan_weights import fold_key_norms, separate

HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 3, 5
CONFIG = HunyuanConfig(
    hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, attention_head_dim=SIZE
)


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, HIDDEN)


def test_qkv_is_interleaved_by_kv_group() -> None:
    # Two groups of two query heads, a key head and a value head, three rows each.
    fused = rows(*range((HEADS + 2 * KV_HEADS) * SIZE))
    got = dict(separate([("layers.0.self_attn.qkv_proj.weight", fused)], CONFIG))
    assert got["layers.0.self_attn.q_proj.weight"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert got["layers.0.self_attn.k_proj.weight"][:, 0].tolist() == [6, 7, 8, 18, 19, 20]
    assert got["layers.0.self_attn.v_proj.weight"][:, 0].tolist() == [9, 10, 11, 21, 22, 23]


def test_a_bias_splits_as_its_weight_does() -> None:
    got = dict(separate([("a.qkv_proj.bias", torch.arange(24.0))], CONFIG))
    assert got["a.k_proj.bias"].tolist() == [6, 7, 8, 18, 19, 20]


def test_up_comes_before_gate() -> None:
    got = dict(separate([("mlp.experts.3.gate_and_up_proj.weight", rows(0, 1, 2, 3))], CONFIG))
    assert got["mlp.experts.3.up_proj.weight"][:, 0].tolist() == [0, 1]
    assert got["mlp.experts.3.gate_proj.weight"][:, 0].tolist() == [2, 3]


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5])], ids=["number", "list of one"])
def test_a_fused_projections_scale_holds_for_all_its_parts(scale: torch.Tensor) -> None:
    got = dict(separate([("a.qkv_proj.weight_scale", scale), ("m.gate_and_up_proj.input_scale", scale)], CONFIG))
    assert {name: tensor.item() for name, tensor in got.items()} == {
        "a.q_proj.weight_scale": 0.5,
        "a.k_proj.weight_scale": 0.5,
        "a.v_proj.weight_scale": 0.5,
        "m.up_proj.input_scale": 0.5,
        "m.gate_proj.input_scale": 0.5,
    }


def test_the_separate_layout_passes_through() -> None:
    weights = [("a.q_proj.weight", rows(1)), ("m.gate_proj.weight", rows(2)), ("norm.weight", rows(3))]
    assert list(separate(weights, CONFIG)) == weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.qkv_proj.weight", r"a\.qkv_proj\.weight: has 7 rows; the configuration asks for 24"),
        ("m.gate_and_up_proj.weight", r"m\.gate_and_up_proj\.weight: has 7 rows; must be an even number"),
    ],
)
def test_rows_that_do_not_divide_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(separate([(name, rows(*range(7)))], CONFIG))


@pytest.mark.parametrize("order", [1, -1], ids=["query first", "key first"])
def test_the_key_norm_goes_into_the_query_norm(order: int) -> None:
    query, key = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])
    weights = [("layers.1.query_layernorm.weight", query), ("layers.1.key_layernorm.weight", key)][::order]
    [(name, folded)] = fold_key_norms(weights, torch.float32)
    assert name == "layers.1.q_norm.weight"
    assert folded.tolist() == [3.0, 1.0]


def test_norms_are_multiplied_before_they_are_rounded() -> None:
    query = torch.tensor([1.0078125], dtype=torch.bfloat16)
    [(_, folded)] = fold_key_norms([("query_layernorm.weight", query), ("key_layernorm.weight", query)], torch.float32)
    assert folded.item() == 1.0078125**2


def test_half_a_pair_of_norms_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.key_layernorm\.weight"):
        list(fold_key_norms([("layers.1.key_layernorm.weight", torch.ones(2))], torch.float32))
