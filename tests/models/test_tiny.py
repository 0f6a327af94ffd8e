"""The tiny checkpoint: its files, its tokenizer, its ways of storing the same weights, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hycluster.errors import InvalidInput
from hycluster.models import tiny
from hycluster.models.layouts import to_fp8, to_fused
from hycluster.models.tiny import TinyShape
from hycluster.models.tiny_tokenizer import SMALLEST_VOCABULARY, build_tokenizer
from tests.models.hunyuan_reference import Reference

SHAPE = TinyShape(layers=3)
PROMPT = [(37 * i * i + 11) % 500 for i in range(40)]

# transformers' own, at its first import
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_same_shape_same_weights_another_seed_others() -> None:
    weights, same, other = (tiny.weights_of(shape) for shape in (SHAPE, SHAPE, replace(SHAPE, seed=1)))
    assert weights.keys() == same.keys() == other.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not any(torch.equal(weights[name], other[name]) for name in weights)


def test_layers_that_share_have_no_keys_and_values_of_their_own() -> None:
    weights = tiny.weights_of(TinyShape(layers=6, cla_share_factor=3))
    owners = {int(name.split(".")[2]) for name in weights if ".k_proj." in name or ".v_proj." in name}
    assert owners == {0, 3}
    assert {int(name.split(".")[2]) for name in weights if "key_layernorm" in name} == set(range(6))


def test_the_random_model_is_worth_comparing_with() -> None:
    shape = TinyShape()
    weights = {name: tensor.float() for name, tensor in tiny.weights_of(shape).items()}
    ids, _, gap = Reference(tiny.config_of(shape), weights).greedy(PROMPT, 32)
    assert gap > 1e-3
    assert len(set(ids)) > 10


def test_rows_past_the_tokenizer_never_win() -> None:
    shape = TinyShape(layers=2, vocabulary=4096)
    weights = {name: tensor.float() for name, tensor in tiny.weights_of(shape).items()}
    ids, _, _ = Reference(tiny.config_of(shape), weights).greedy(PROMPT, 32)
    assert max(ids) < len(build_tokenizer(4096)) < 4096


@pytest.mark.parametrize("bias", [False, True])
def test_fused_rows_are_queries_key_value_of_one_group_after_another(bias: bool) -> None:
    shape = replace(SHAPE, heads=4, kv_heads=2, attention_bias=bias)
    weights = tiny.weights_of(shape)
    fused = to_fused(weights, shape.kv_heads)
    for kind in ["weight", "bias"] if bias else ["weight"]:
        query, key, value = (torch.split(weights[f"model.layers.0.self_attn.{part}_proj.{kind}"], 32) for part in "qkv")
        rows = [query[0], query[1], key[0], value[0], query[2], query[3], key[1], value[1]]
        assert torch.equal(fused[f"model.layers.0.self_attn.qkv_proj.{kind}"], torch.cat(rows))
    for mlp in ("experts.7", "shared_mlp"):
        name = f"model.layers.1.mlp.{mlp}"
        up_then_gate = torch.cat([weights[f"{name}.up_proj.weight"], weights[f"{name}.gate_proj.weight"]])
        assert torch.equal(fused[f"{name}.gate_and_up_proj.weight"], up_then_gate)
    # Layer 1 shares the keys and values of layer 0.
    assert "model.layers.1.self_attn.q_proj.weight" in fused
    assert sum(tensor.numel() for tensor in fused.values()) == sum(tensor.numel() for tensor in weights.values())


def test_fp8_is_the_same_weights_to_three_bits() -> None:
    weights = tiny.weights_of(SHAPE)
    quantized = to_fp8(weights)
    projections = [name for name, tensor in quantized.items() if tensor.dtype == torch.float8_e4m3fn]
    # 3 layers: q and o in each, k and v in two, three matrices in each of 8 experts and the shared one.
    assert len(projections) == 3 * 2 + 2 * 2 + 3 * 3 * 9
    for name in projections:
        scale = quantized[name.removesuffix("weight") + "weight_scale"]
        assert scale.shape == quantized[name.removesuffix("weight") + "input_scale"].shape == ()
        wanted = weights[name].float()
        # Half a step of a 3-bit mantissa, and half of the smallest subnormal.
        torch.testing.assert_close(quantized[name].float() * scale, wanted, rtol=2**-4, atol=float(scale) * 2**-10)
    assert torch.equal(quantized["model.layers.0.mlp.gate.wg.weight"], weights["model.layers.0.mlp.gate.wg.weight"])


def saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in folder.iterdir()
        if file.suffix in {".safetensors", ".bin"}
        for name, tensor in (load_file(file) if file.suffix == ".safetensors" else torch.load(file)).items()
    }


@pytest.mark.parametrize(
    ("stored", "files"),
    [
        ({}, {"model.safetensors"}),
        ({"dtype": "float32"}, {"model.safetensors"}),
        ({"file_format": "bin"}, {"pytorch_model.bin"}),
        (
            {"shard_mib": 1},
            {"model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))},
        ),
        (
            {"shard_mib": 1, "file_format": "bin"},
            {"pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))},
        ),
    ],
)
def test_every_way_of_storing_holds_the_same_values(tmp_path: Path, stored: dict[str, Any], files: set[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", SHAPE, **stored)
    assert {file.name for file in folder.iterdir() if "model" in file.name} == files
    weights = tiny.weights_of(SHAPE)
    found = saved(folder)
    assert found.keys() == weights.keys()
    dtype = getattr(torch, stored.get("dtype", "bfloat16"))
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in weights.items())


def test_the_configuration_says_what_is_stored(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path, SHAPE, layout="fused", dtype="fp8")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["activation_scheme"] == "static"
    assert "model.layers.0.mlp.gate.wg" in config["quantization_config"]["ignored_layers"]
    found = saved(folder)
    assert found["model.layers.0.self_attn.qkv_proj.weight"].dtype == torch.float8_e4m3fn
    assert found["model.layers.0.self_attn.qkv_proj.weight_scale"].numel() == 1


def test_overwriting_leaves_nothing_of_the_old_weights_and_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="is not empty; choose another, or say --overwrite"):
        tiny.write_checkpoint(tmp_path, SHAPE)
    tiny.write_checkpoint(tmp_path, SHAPE, shard_mib=1, overwrite=True)
    tiny.write_checkpoint(tmp_path, SHAPE, overwrite=True)
    assert {file.name for file in tmp_path.iterdir() if "model" in file.name} == {"model.safetensors"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": 0}, "layers: 0 is not allowed; must be at least 1"),
        ({"heads": 3, "kv_heads": 2, "head_size": 32}, "heads: 3 is not allowed; must be a multiple of kv_heads (2)"),
        ({"hidden": 130}, "hidden: 130 is not allowed; must be a multiple of heads (4), or head_size set"),
        ({"head_size": 16}, "head_size: 16 is not allowed; must be one of 32, "),
        ({"topk": 9}, "topk: 9 is not allowed; must be at most experts (8)"),
        ({"vocabulary": 256}, f"vocabulary: 256 is not allowed; must be at least {SMALLEST_VOCABULARY}"),
        ({"rope_alpha": 0.5}, "rope_alpha: 0.5 is not allowed; must be 0 (no scaling) or above 1"),
        ({"cla_share_factor": 1}, "cla_share_factor: 1 is not allowed; must be at least 2"),
        ({"architecture": "llama"}, "architecture: 'llama' is not allowed; must be one of hunyuan-large, hunyuan-a13b"),
        ({"architecture": "hunyuan-a13b"}, "cla: True is not allowed; must be off"),
        ({"seed": -1}, "seed: -1 is not allowed"),
    ],
)
def test_a_wrong_shape_is_refused_in_one_line(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        TinyShape(**wrong)
    assert says in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layout": "packed"}, "layout: 'packed' is not allowed; must be one of separate, fused"),
        ({"file_format": "gguf"}, "format: 'gguf' is not allowed; must be one of safetensors, bin"),
        ({"dtype": "int8"}, "dtype: 'int8' is not allowed; must be one of bfloat16, float32, fp8"),
        ({"shard_mib": 0}, "shard_mib: 0 is not allowed; must be above 0"),
    ],
)
def test_a_wrong_way_of_storing_is_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        tiny.write_checkpoint(tmp_path / "model", SHAPE, **wrong)
    assert refused.value.message == says
    assert not (tmp_path / "model").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(InvalidInput, match="is a file; must be a folder"):
        tiny.write_checkpoint(tmp_path / "model", SHAPE, overwrite=True)
