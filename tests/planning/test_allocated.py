"""The arithmetic beside what vLLM allocates for small models on CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hycluster.models.tiny import TinyShape, config_of
from hycluster.planning.architecture import Architecture
from hycluster.planning.families import architecture
from hycluster.planning.precision import Precision
from hycluster.planning.shares import device_share
from hycluster.settings.parallel import Parallel
from tests.vllm_forks import VllmForks

KV_CACHE_BYTES = 1 << 24
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FULL = Precision("float32", "float32", "float32")

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # First, for a running engine.
    "latent": SMALL | LATENT | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
    "dense": SMALL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "experts": SMALL | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
    "one KV head": SMALL | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 1},
    "hunyuan": config_of(TinyShape(hidden=128, heads=4, kv_heads=2, experts=8, layers=4)),
}
# An engine takes long to start; Hunyuan's cache is read from running ones in tests/models/test_hunyuan.py.
ENGINES = ("latent",)


@pytest.fixture(scope="module")
def told(vllm_forks: VllmForks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says of every configuration, by name; see allocated.py."""
    home = tmp_path_factory.mktemp("allocated")
    folders = []
    for name, config in CONFIGS.items():
        folder = home / name.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    printed = vllm_forks.run(
        "tests.planning.allocated",
        str(len(ENGINES)),
        *folders,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0"},
        timeout_s=580,
    )
    return dict(zip(CONFIGS, json.loads(printed.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_divides_its_cache_as_counted(told: dict[str, Any], name: str) -> None:
    each = device_share(architecture(CONFIGS[name]), Parallel(), FULL).kv_bytes_per_token
    found = told[name]["engine"]
    assert found["blocks"] == KV_CACHE_BYTES // (each * found["block_tokens"])


WAYS = [(name, False) for name in CONFIGS] + [(name, True) for name in ("experts", "latent", "hunyuan")]


@pytest.mark.parametrize(("name", "expert"), WAYS)
def test_a_rank_holds_the_share_that_was_counted(told: dict[str, Any], name: str, expert: bool) -> None:
    model = architecture(CONFIGS[name])
    share = device_share(model, Parallel(tensor=2, expert=expert), FULL)
    found = told[name]["ranks"][str(expert)]
    assert found["kv_bytes_per_token"] == share.kv_bytes_per_token
    # The last norm is no layer's. Hunyuan's key norms are folded into its query norms.
    last = model.hidden * 4
    folded = len(model.layers) * model.head_size * 4 if name == "hunyuan" else 0
    assert found["weights_bytes"] == share.weights_bytes - second_form(model) + last - folded


def second_form(model: Architecture) -> int:
    """Latent attention's projections for decoding, on one of two ranks: made only when weights have been loaded."""
    latent = model.latent
    return 0 if latent is None else len(model.layers) * 2 * latent.kv_rank * (latent.key_size + latent.value_size) * 4
