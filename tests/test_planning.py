from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from hycluster.config import Eplb, Parallel
from hycluster.errors import SettingsError
from hycluster.models.tiny import TinyShape, config_of, weights_of
from hycluster.planning import (
    GIB,
    KIB,
    architecture,
    device_share,
    expert_parameters,
    kv_bytes_per_token,
    mha_kv_bytes_per_token,
    parameters,
)

MODELS = Path(__file__).parent.parent / "hycluster" / "models"


def published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return config


LARGE = architecture(published("hunyuan_large"))
A13B = architecture(published("hunyuan_a13b"))


def test_hunyuan_large_is_as_large_as_published() -> None:
    """389B in all and 52B active (arXiv 2411.02265). 52B counts the tied embedding as input and as output."""
    counted = parameters(LARGE)
    assert round(counted.total / 1e9) == 389
    assert round((counted.active + counted.embedding) / 1e9) == 52
    assert round(expert_parameters(LARGE) / 1e9, 1) == 22.5


def test_a13b_is_as_large_as_published() -> None:
    counted = parameters(A13B)
    assert round(counted.total / 1e9) == 80
    assert round(counted.active / 1e9) == 13


def test_a_token_of_hunyuan_large_takes_80_kib() -> None:
    assert kv_bytes_per_token(LARGE) == 80 * KIB
    assert kv_bytes_per_token(LARGE) / mha_kv_bytes_per_token(LARGE) == 0.05
    assert kv_bytes_per_token(LARGE, "fp8") == 40 * KIB


def test_sharing_halves_the_cache_and_takes_projections_away() -> None:
    alone = architecture(published("hunyuan_large") | {"use_cla": False})
    assert kv_bytes_per_token(alone) == 2 * kv_bytes_per_token(LARGE)
    projections = 32 * 2 * 8 * 80 * 6400
    assert parameters(alone).total - parameters(LARGE).total == projections


@pytest.mark.parametrize(
    "shape",
    [
        TinyShape(),
        TinyShape(layers=5, cla_share_factor=3, head_size=64, experts=4, topk=2, shared_experts=2),
        TinyShape(layers=2, cla=False, experts=1, shared_experts=0, attention_bias=True, tied_embeddings=False),
        TinyShape(layers=2, architecture="hunyuan-a13b", cla=False, topk=3, shared_experts=0),
    ],
)
def test_counts_what_a_checkpoint_holds(shape: TinyShape) -> None:
    held = sum(weight.numel() for weight in weights_of(shape).values())
    assert parameters(architecture(config_of(shape))).total == held


def transformers_config(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        small = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
        }
        special: dict[str, Any] = {
            "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "qwen3": {"head_dim": 24},
            "qwen3_moe": {
                "num_experts": 6,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "head_dim": 24,
                "decoder_sparse_step": 2,
            },
        }
        return transformers.AutoConfig.for_model(kind, **small, **special.get(kind, {}))


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_counts_as_transformers_builds_them(kind: str) -> None:
    config = transformers_config(kind)
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = parameters(architecture(config.to_dict()))
    assert counted.total == sum(weight.numel() for weight in model.parameters())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^model_type: 'bert' is not known; must be one of hunyuan, "):
        architecture({"model_type": "bert"})


def test_a_missing_field_is_named() -> None:
    config = published("hunyuan_large")
    del config["num_hidden_layers"]
    with pytest.raises(SettingsError, match=r"^num_hidden_layers: None is not allowed; must be a number"):
        architecture(config)


def test_an_unknown_data_type_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^dtype: 'int4' is not allowed; must be one of float32, "):
        kv_bytes_per_token(LARGE, "int4")


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(expert=True)])
def test_one_device_holds_it_all(parallel: Parallel) -> None:
    share = device_share(LARGE, parallel)
    assert share.weights_bytes == 2 * parameters(LARGE).total
    assert share.kv_bytes_per_token == 80 * KIB


def test_pipeline_stages_halve_both() -> None:
    whole, half = device_share(LARGE, Parallel(tensor=8)), device_share(LARGE, Parallel(tensor=8, pipeline=2))
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token == 10 * KIB
    # The ends are on every stage's account, the stages on half.
    assert half.weights_bytes == pytest.approx(whole.weights_bytes / 2 + parameters(LARGE).embedding / 8)


def test_experts_lie_whole_on_ranks() -> None:
    cut, whole = (device_share(LARGE, Parallel(tensor=8, data=2, expert=expert)) for expert in (False, True))
    # 16 experts on 16 ranks: as much, differently.
    assert cut == whole
    # 16 experts on 12 ranks: the fullest rank has two.
    uneven = device_share(LARGE, Parallel(tensor=4, data=3, expert=True))
    even = device_share(LARGE, Parallel(tensor=4, data=2, expert=True))
    assert uneven == even


def test_copies_of_experts_weigh_as_much() -> None:
    plain = Parallel(tensor=8, expert=True)
    copied = Parallel(tensor=8, expert=True, eplb=Eplb(enabled=True, redundant_experts=8))
    more = device_share(LARGE, copied).weights_bytes - device_share(LARGE, plain).weights_bytes
    assert more == 2 * expert_parameters(LARGE)


def test_a_head_is_not_cut() -> None:
    assert device_share(LARGE, Parallel(tensor=16)).kv_bytes_per_token == 10 * KIB


def test_eight_bits_halve_the_projections_only() -> None:
    sixteen, eight = (device_share(LARGE, Parallel(), weights) for weights in ("bfloat16", "fp8"))
    counted = parameters(LARGE)
    kept = 2 * (counted.embedding + counted.norms + counted.router)
    assert eight.weights_bytes == (sixteen.weights_bytes - kept) / 2 + kept


def test_room_for_tokens() -> None:
    share = replace(device_share(LARGE, Parallel()), weights_bytes=10 * GIB, kv_bytes_per_token=GIB)
    assert share.kv_tokens(20, utilization=0.9, reserve_gib=2) == 6
    assert share.kv_tokens(10) == 0


def test_planning_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers'}"
    code = f"import sys; import hycluster.planning; print(sorted({heavy} & sys.modules.keys()))"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
