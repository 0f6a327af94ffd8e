"""Counts beside what the models' makers publish."""

from __future__ import annotations

import pytest

from hycluster.planning.architecture import GIB, KIB, expert_parameters, kv_channels, parameters
from hycluster.planning.families import architecture
from hycluster.planning.plan import total_weights_bytes
from hycluster.planning.precision import precision_of
from hycluster.planning.shares import kv_bytes_per_token, mha_kv_bytes_per_token
from tests.planning.configs import PATHS, published, shape

# In billions, with as many digits as are published: in all, and active a token. Sources are in docs/planning.md.
TOTAL_AND_ACTIVE = {
    "deepseek-v2-lite": ("15.7", "2.4"),
    "deepseek-v3": ("671", "37"),
    "gpt-oss-120b": ("116.83", "5.13"),
    "gpt-oss-20b": ("20.91", "3.61"),
    "hunyuan-a13b": ("80", "13"),
    "hunyuan-large": ("389", "52"),
    "kimi-k2": ("1000", "32"),
    "llama-3.1-405b": ("406", None),
    "llama-3.1-70b": ("70.6", None),
    "llama-3.1-8b": ("8.03", None),
    "mixtral-8x7b": ("46.7", "12.9"),
    "qwen2.5-72b": ("72.7", None),
    "qwen3-235b-a22b": ("235", "22"),
    "qwen3-30b-a3b": ("30.5", "3.3"),
    "qwen3-8b": ("8.2", None),
}
# Makers differ in whether the embedding is active beside the head; Tencent counts a tied one twice.
EMBEDDINGS_ACTIVE = {
    "deepseek-v2-lite": 0,
    "deepseek-v3": 0,
    "gpt-oss-120b": 0,
    "gpt-oss-20b": 0,
    "hunyuan-large": 2,
    "kimi-k2": 0,
}


def rounded_like(count: float, said: str) -> str:
    return f"{count / 1e9:.{len(said.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PATHS)
def test_as_large_as_published(name: str) -> None:
    total, active = TOTAL_AND_ACTIVE[name]
    counted = parameters(shape(name))
    # Some makers cut digits off where others round: 20.915 is published as 20.91, 3.35 as 3.3.
    # And Kimi K2 is one of "1 trillion".
    off = 30 if name == "kimi-k2" else 0.011 if "." in total else 0
    assert float(rounded_like(counted.total, total)) == pytest.approx(float(total), abs=off)
    if active is not None:
        tables = EMBEDDINGS_ACTIVE.get(name, 1)
        bare = counted.active - counted.embedding if tables == 0 else counted.active
        with_tables = bare + (counted.embedding if tables == 2 else 0)
        assert float(rounded_like(with_tables, active)) == pytest.approx(
            float(active), abs=0.11 if "." in active else 0
        )


# Bytes in bfloat16: Table 1 of arXiv 2505.09343 for the first three, arXiv 2411.02265 for Hunyuan-Large.
KV_BYTES = {
    "deepseek-v3": 70_272,
    "qwen2.5-72b": 327_680,
    "llama-3.1-405b": 516_096,
    "hunyuan-large": 80 * KIB,
}


@pytest.mark.parametrize("name", KV_BYTES)
def test_a_token_takes_the_kv_cache_that_is_published(name: str) -> None:
    assert kv_bytes_per_token(shape(name)) == KV_BYTES[name]


# The model card's checkpoint sizes, in GiB.
@pytest.mark.parametrize(("name", "published_gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_a_checkpoint_is_as_large_as_published(name: str, published_gib: float) -> None:
    held = total_weights_bytes(parameters(shape(name)), precision_of(published(name)))
    assert held / GIB == pytest.approx(published_gib, rel=0.002)


def test_hunyuan_larges_cache_is_five_percent_of_full_attentions() -> None:
    model = shape("hunyuan-large")
    assert kv_bytes_per_token(model) / mha_kv_bytes_per_token(model) == 0.05
    assert kv_bytes_per_token(model, "fp8") == 40 * KIB
    assert round(expert_parameters(model) / 1e9, 1) == 22.5


def test_sharing_halves_the_cache_and_takes_projections_away() -> None:
    shared, alone = shape("hunyuan-large"), architecture(published("hunyuan-large") | {"use_cla": False})
    assert kv_bytes_per_token(alone) == 2 * kv_bytes_per_token(shared)
    assert parameters(alone).total - parameters(shared).total == 32 * 2 * 8 * 80 * 6400


def test_kimi_k2_is_deepseek_v3_in_other_sizes() -> None:
    config = published("deepseek-v3")
    assert parameters(architecture(config | {"model_type": "kimi_k2"})) == parameters(architecture(config))


def test_a_window_bounds_what_a_sequence_keeps() -> None:
    model = shape("gpt-oss-20b")
    # A window of 128 tokens lies in at most 9 blocks of 16.
    assert kv_channels(model, 100) == 100 * kv_channels(model)
    full, bounded = 12 * 10_000, 12 * 144
    assert kv_channels(model, 10_000) == (full + bounded) * 2 * 8 * 64
