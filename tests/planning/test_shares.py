from __future__ import annotations

from dataclasses import replace

import pytest

from hycluster.planning.architecture import GIB, KIB, expert_parameters, kv_channels, parameters
from hycluster.planning.families import architecture
from hycluster.planning.precision import Precision
from hycluster.planning.shares import device_share, kv_copies, stages
from hycluster.settings.parallel import Eplb, Parallel
from tests.planning.configs import published, shape

LARGE, V3 = shape("hunyuan-large"), shape("deepseek-v3")


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(expert=True)])
def test_one_device_holds_it_all(parallel: Parallel) -> None:
    share = device_share(LARGE, parallel)
    # All but the last norm, which is not a layer's.
    assert share.weights_bytes == 2 * (parameters(LARGE).total - LARGE.hidden)
    assert share.kv_bytes_per_token == 80 * KIB


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b"])
def test_ranks_hold_what_the_model_has(name: str) -> None:
    model, small = shape(name), Precision()
    whole = device_share(model, Parallel(), small).weights_bytes
    halves = 2 * device_share(model, Parallel(tensor=2), small).weights_bytes
    # What is on every rank: router and norms.
    assert 0 < halves - whole < 0.001 * whole


def test_pipeline_stages_halve_both() -> None:
    whole, half = device_share(LARGE, Parallel(tensor=8)), device_share(LARGE, Parallel(tensor=8, pipeline=2))
    assert half.kv_bytes_per_token * 2 == whole.kv_bytes_per_token == 10 * KIB
    # The tied embedding is on the first stage, and again as the head on the last.
    assert half.weights_bytes == pytest.approx(whole.weights_bytes / 2 + parameters(LARGE).embedding / 8)


def test_an_uneven_pipeline_is_as_heavy_as_its_heaviest_stage() -> None:
    # 61 layers: 30 with the 3 dense ones and one more, 31 with experts alone.
    first, second = stages(V3, 2)
    assert (len(first), len(second)) == (31, 30)
    assert [layer.experts for layer in first[:4]] == [0, 0, 0, 256]
    share = device_share(V3, Parallel(pipeline=2))
    assert share.weights_bytes > device_share(V3, Parallel()).weights_bytes / 2


def test_layers_left_over_go_to_the_stages_before_the_last() -> None:
    assert [len(stage) for stage in stages(LARGE, 5)] == [13, 13, 13, 13, 12]
    assert [len(stage) for stage in stages(LARGE, 7)] == [9, 9, 9, 9, 9, 10, 9]


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


def test_a_kv_head_is_not_cut() -> None:
    assert device_share(LARGE, Parallel(tensor=16)).kv_bytes_per_token == 10 * KIB
    assert kv_copies(LARGE, 16) == 2
    # The projections that make it are there twice as well.
    model = shape("qwen3-30b-a3b")
    cut = 2 * parameters(model).total / 8
    doubled = 48 * 2 * 128 * 2048 * 2 * (8 - 4) / 8
    rest = 2 * (48 * (2048 * 128 + 2 * 2048 + 2 * 128)) * 7 / 8
    assert device_share(model, Parallel(tensor=8)).weights_bytes == pytest.approx(cut + doubled + rest, rel=1e-5)


def test_a_latent_cache_is_whole_on_every_tensor_rank() -> None:
    one, eight = device_share(V3, Parallel()), device_share(V3, Parallel(tensor=8))
    assert one.kv_bytes_per_token == eight.kv_bytes_per_token == 70_272
    assert kv_copies(V3, 8) == 8


def test_latent_attention_decodes_with_projections_of_its_own() -> None:
    extra = 61 * 128 * 512 * (128 + 128)
    assert device_share(V3, Parallel()).weights_bytes == 2 * (parameters(V3).total - V3.hidden + extra)


def test_eight_bits_halve_the_projections_only() -> None:
    sixteen, eight = (device_share(LARGE, Parallel(), Precision(weights)) for weights in ("bfloat16", "fp8"))
    counted = parameters(LARGE)
    kept = 2 * (counted.embedding + counted.norms - LARGE.hidden + counted.router)
    assert eight.weights_bytes == (sixteen.weights_bytes - kept) / 2 + kept


def test_room_for_tokens() -> None:
    share = replace(device_share(LARGE, Parallel()), weights_bytes=10 * GIB, kv_bytes_per_token=GIB)
    assert share.kv_tokens(20, utilization=0.9, reserve_gib=2) == 6
    assert share.kv_tokens(10) == 0


@pytest.mark.parametrize("tokens", [1, 144, 145, 20_000])
def test_a_device_keeps_its_part_of_what_windows_leave(tokens: int) -> None:
    model = shape("gpt-oss-120b")
    share = device_share(model, Parallel(tensor=4))
    assert share.kv_bytes(tokens) == 2 * kv_channels(model, tokens) / 4


def test_a_window_in_all_layers_bounds_a_sequence_for_good() -> None:
    model = architecture(published("llama-3.1-8b") | {"model_type": "mistral", "sliding_window": 4096})
    share = device_share(model, Parallel())
    assert share.kv_bytes(8192) == share.kv_bytes(100_000) == (4096 + 16) * share.kv_bytes_per_token
