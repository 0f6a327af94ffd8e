from __future__ import annotations

import pytest

from hycluster.engine.routed_weights import RoutedWeights
from hycluster.engine.step_time import StepWork
from hycluster.planning.gpus import gpu
from hycluster.planning.precision import Precision
from hycluster.planning.shares import device_share
from hycluster.planning.speed import decode_bound, prefill_s
from hycluster.settings.model import Model
from hycluster.settings.parallel import Parallel
from hycluster.simulate.machine import OnGpu, machine_of
from hycluster.simulate.step_work import LinearStep, Roofline
from tests.planning.configs import PATHS, shape

PARALLEL, PRECISION = Parallel(tensor=8, expert=True), Precision("fp8", kv="fp8")
MODEL = shape("hunyuan-large")
SHARE = device_share(MODEL, PARALLEL, PRECISION)


def roofline(name: str = "H20", efficiency: float = 1.0) -> Roofline:
    return Roofline(MODEL, PARALLEL, SHARE, PRECISION, gpu(name), efficiency)


def test_four_coefficients() -> None:
    assert LinearStep(1, 0.1, 0.01, 0.001)(StepWork(10, 5, 3)) == pytest.approx(2.053)


def test_a_decode_step_is_the_plans() -> None:
    plan = decode_bound(MODEL, PARALLEL, SHARE, PRECISION, gpu("H20"), 32, 2000)
    assert roofline()(StepWork(0, 32, 64_000)) == pytest.approx(plan.step_s, rel=0.01)


def test_a_prompt_takes_what_the_plan_says() -> None:
    tokens = 8192
    work = StepWork(tokens - 1, 1, tokens, tokens * (tokens + 1) // 2)
    # The plan leaves out the output head; this has it for each token.
    assert roofline()(work) == pytest.approx(prefill_s(MODEL, PARALLEL, PRECISION, gpu("H20"), tokens), rel=0.05)


def test_tokens_are_free_until_arithmetic_takes_longer_than_reading_the_weights() -> None:
    few, some, many = (roofline("H200")(StepWork(0, rows)) for rows in (128, 512, 4096))
    assert some == pytest.approx(few, rel=0.01)
    assert many > 2 * some


def test_a_share_of_the_peak() -> None:
    work = StepWork(100, 10, 10_000, 5050)
    assert roofline(efficiency=0.5)(work) == pytest.approx(2 * roofline()(work))


def test_a_scheduler_is_told_of_the_experts_that_a_gpu_holds() -> None:
    def experts(name: str, parallel: Parallel, weights: str | None = None) -> RoutedWeights | None:
        model = Model(name="m", source=str(PATHS[name]), engine={"max_model_len": 4096}, parallel=parallel)
        return machine_of(model, OnGpu("H200", PATHS[name], weights)).experts

    whole, cut = experts("hunyuan-large", PARALLEL, "fp8"), experts("hunyuan-large", Parallel(tensor=8), "fp8")
    assert whole is not None
    assert cut is not None
    assert (whole.experts, whole.top_k, whole.held, whole.ranks) == (16, 1, 2, 8)
    assert whole.share == pytest.approx(SHARE.routed / (SHARE.routed + SHARE.read))
    assert (cut.held, cut.ranks) == (16, 1)
    assert cut.touched(1) == pytest.approx(1 / 16)
    # With shared experts, and dense layers before; both are read in any case.
    shared = experts("deepseek-v3", PARALLEL)
    assert shared is not None
    assert (shared.experts, shared.top_k, shared.held, shared.ranks) == (256, 8, 32, 8)
    assert 0.9 < shared.share < 1
    assert experts("llama-3.1-8b", Parallel()) is None
