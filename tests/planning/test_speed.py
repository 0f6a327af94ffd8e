from __future__ import annotations

import pytest

from hycluster.planning.architecture import parameters
from hycluster.planning.gpus import gpu
from hycluster.planning.precision import Precision
from hycluster.planning.shares import device_share
from hycluster.planning.speed import Decode, decode_bound, prefill_s
from hycluster.settings.parallel import Parallel
from tests.planning.configs import shape

H20, H100 = gpu("H20"), gpu("H100")


def bound(
    name: str, parallel: Parallel, batch: int, context: int = 2048, weights: str = "bfloat16", offloaded: int = 0
) -> Decode:
    model, precision = shape(name), Precision(weights)
    share = device_share(model, parallel, precision)
    return decode_bound(model, parallel, share, precision, H20, batch, context, offloaded)


def test_a_lone_sequence_reads_the_active_weights() -> None:
    one = bound("hunyuan-large", Parallel(), 1, context=1)
    active = parameters(shape("hunyuan-large")).active
    assert one.weights_bytes == pytest.approx(2 * active, rel=1e-6)
    assert one.step_s == pytest.approx((2 * active + one.kv_bytes) / 4e12)
    assert one.limit == "memory bandwidth"


def test_a_large_batch_reads_every_expert_and_is_bound_by_arithmetic() -> None:
    many = bound("hunyuan-large", Parallel(tensor=8, data=2, expert=True), 4096, context=16)
    share = device_share(shape("hunyuan-large"), Parallel(tensor=8, data=2, expert=True))
    assert many.weights_bytes == pytest.approx(share.read + share.routed, rel=1e-6)
    assert many.limit == "arithmetic"
    # 2 operations a weight and token, on 16 GPUs, by 148 TFLOPS of an H20.
    active = parameters(shape("hunyuan-large")).active
    assert many.tokens_per_s == pytest.approx(16 * 148e12 / (2 * active), rel=0.01)


def test_a_token_with_one_expert_keeps_one_rank_busy() -> None:
    cut, whole = (bound("hunyuan-large", Parallel(tensor=8, expert=expert), 1) for expert in (False, True))
    assert whole.step_s > 2 * cut.step_s


def test_a_pipeline_makes_no_lone_sequence_faster() -> None:
    one, two = (bound("llama-3.1-70b", Parallel(tensor=8, pipeline=stages), 1) for stages in (1, 2))
    assert two.step_s == pytest.approx(one.step_s, rel=0.02)
    # With work for both stages it holds twice as many and is as fast.
    assert bound("llama-3.1-70b", Parallel(tensor=8, pipeline=2), 2).step_s == pytest.approx(one.step_s, rel=0.02)


def test_a_long_context_costs_its_cache() -> None:
    short, long = (bound("llama-3.1-70b", Parallel(tensor=8), 16, context) for context in (1, 65_536))
    assert long.step_s - short.step_s == pytest.approx(16 * 65_535 * 327_680 / 8 / 4e12)


def test_what_lies_in_host_memory_is_read_from_there() -> None:
    half = device_share(shape("llama-3.1-8b"), Parallel()).weights_bytes // 2
    slow = bound("llama-3.1-8b", Parallel(), 1, offloaded=half)
    assert slow.limit == "host memory"
    assert slow.step_s == pytest.approx(half / 64e9, rel=0.1)


# README of Tencent/Tencent-Hunyuan-Large, "Inference Performance": 2048 tokens in, batch 1 and batch 4.
@pytest.mark.parametrize(
    ("weights", "gpus", "batch", "measured"),
    [
        ("bfloat16", 16, 1, 20.2),
        ("bfloat16", 16, 4, 75.5),
        ("int8", 8, 1, 19.3),
        ("int8", 8, 4, 73.6),
        ("fp8", 8, 1, 19.8),
        ("fp8", 8, 4, 74.9),
    ],
)
def test_what_tencent_measured_is_below_the_bound(weights: str, gpus: int, batch: int, measured: float) -> None:
    most = bound("hunyuan-large", Parallel(tensor=gpus), batch, weights=weights).tokens_per_s
    assert 0.02 * most < measured < 0.1 * most


def test_prefill_is_two_operations_a_weight_and_its_attention() -> None:
    model = shape("llama-3.1-8b")
    counted = parameters(model)
    tokens = 1000
    projections = 2 * tokens * (counted.attention + counted.mlp)
    attention = 32 * 2 * (2 * 4096) * tokens * (tokens + 1) / 2
    assert prefill_s(model, Parallel(), Precision(), H100, tokens) == pytest.approx((projections + attention) / 989e12)


def test_a_window_spares_prefill_the_far_pairs() -> None:
    model = shape("gpt-oss-120b")
    short, long = (prefill_s(model, Parallel(), Precision("mxfp4"), H100, tokens) for tokens in (1000, 100_000))
    assert 100 * short < long < 10_000 * short


def test_data_ranks_do_not_help_a_lone_prompt_with_its_attention() -> None:
    model = shape("deepseek-v3")
    alone = prefill_s(model, Parallel(data=8, expert=True), Precision("fp8"), H100, 4096)
    shared = prefill_s(model, Parallel(data=8, expert=True), Precision("fp8"), H100, 4096, alone=False)
    assert shared == pytest.approx(prefill_s(model, Parallel(tensor=8), Precision("fp8"), H100, 4096))
    assert alone > shared
