from __future__ import annotations

import random

import pytest

from hycluster.engine.routed_weights import RoutedWeights
from hycluster.engine.step_time import StepTime, StepWork, prefill_pairs

# Of a pair of a query and a key in prompts.
PAIR_S = 2e-9
LAPTOP, GPU = (0.07, 0.003, 0.012, 1e-6), (0.012, 3e-5, 2e-5, 1.5e-8)


def real_s(machine: tuple[float, float, float, float], work: StepWork) -> float:
    base, prefill, sequence, kv = machine
    return base + prefill * work.prefill_tokens + sequence * work.sequences + kv * work.kv_tokens


def some_work(random_: random.Random) -> StepWork:
    rows = random_.randint(1, 64)
    return StepWork(random_.choice([0, 0, 0, 50, 300]), rows, rows * random_.randint(50, 800))


@pytest.mark.parametrize("machine", [LAPTOP, GPU], ids=["laptop", "GPU"])
def test_it_learns_a_machine_through_noise_and_outliers(machine: tuple[float, float, float, float]) -> None:
    step_time, random_ = StepTime(), random.Random(1)
    for _ in range(400):
        work = some_work(random_)
        noise = random_.lognormvariate(0, 0.1) * (10 if random_.random() < 0.02 else 1)
        step_time.learn(work, noise * real_s(machine, work))
    for work in (StepWork(0, 1, 100), StepWork(0, 64, 20000), StepWork(300, 1, 300), StepWork(300, 30, 9000)):
        assert step_time.predict(work) == pytest.approx(real_s(machine, work), rel=0.15)
    assert step_time.error < 0.2


def test_it_follows_a_machine_that_gets_slower() -> None:
    step_time, random_ = StepTime(), random.Random(2)
    for factor in (1, 2):
        for _ in range(600):
            work = some_work(random_)
            step_time.learn(work, factor * real_s(GPU, work))
        work = StepWork(0, 32, 10000)
        assert step_time.predict(work) == pytest.approx(factor * real_s(GPU, work), rel=0.1)


def long_prompts(random_: random.Random) -> StepWork:
    """Rows that decode, and at times a chunk of a prompt, early or late in it."""
    rows, computed = random_.randint(1, 30), random_.randrange(0, 30_000)
    tokens = random_.choice([0, 0, 100, 500, 2000])
    pairs = prefill_pairs(tokens, computed)
    return StepWork(max(0, tokens - 1), rows, rows * random_.randint(50, 800) + computed, pairs)


@pytest.mark.parametrize("knee", [False, True], ids=["no token is free", "some are"])
def test_late_in_a_long_prompt_a_chunk_takes_longer(knee: bool) -> None:
    def seconds(work: StepWork) -> float:
        return (roofline_s(work) if knee else real_s(GPU, work)) + PAIR_S * work.prefill_pairs

    step_time, random_ = StepTime(), random.Random(9)
    works = [long_prompts(random_) for _ in range(1500)]
    for work in works:
        step_time.learn(work, random_.lognormvariate(0, 0.05) * seconds(work))
    early, late = (StepWork(1999, 2, 2000 + before, prefill_pairs(2000, before)) for before in (0, 28_000))
    for work in (early, late, StepWork(0, 20, 8000)):
        assert step_time.predict(work) == pytest.approx(seconds(work), rel=0.1)
    assert seconds(late) > 1.5 * seconds(early)
    assert step_time.chunk_s(2000, 28_000) > 1.8 * step_time.chunk_s(2000, 0)
    # Who knows four coefficients only is told of a prompt token with as many before it as there were lately.
    if not knee:
        chunks = [work for work in works[-400:] if work.prefill_tokens]
        mean = sum(work.prefill_pairs for work in chunks) / sum(work.prefill_tokens for work in chunks)
        assert step_time.coefficients_s[1] == pytest.approx(GPU[1] + PAIR_S * mean, rel=0.4)


@pytest.mark.parametrize("free", [0, 300])
@pytest.mark.parametrize("pair_s", [0.0, PAIR_S])
def test_what_fits_is_the_longest_chunk_that_does(free: int, pair_s: float) -> None:
    step_time, random_ = StepTime(), random.Random(10)
    for _ in range(200):
        work = long_prompts(random_)
        step_time.learn(work, real_s(GPU, work) + pair_s * work.prefill_pairs)
    for computed in (0, 20_000):
        for seconds in (0.001, 0.02, 0.1):
            tokens = int(step_time.chunk_within(seconds, computed, free))
            assert step_time.chunk_s(tokens, computed, free) <= seconds * 1.01
            assert step_time.chunk_s(tokens + 2, computed, free) > seconds * 0.99
    assert step_time.chunk_within(0.0, 500) == 0


def test_nothing_takes_less_than_no_time() -> None:
    step_time = StepTime()
    for rows in range(1, 30):
        step_time.learn(StepWork(0, rows, 100), 0.1 / rows)
    parts = step_time.base_s, step_time.prefill_token_s, step_time.sequence_s, step_time.kv_token_s
    assert min(parts) >= 0


def test_what_it_has_not_seen_it_does_not_pretend_to_know() -> None:
    step_time = StepTime()
    assert (step_time.known, step_time.error, step_time.predict(StepWork(0, 5, 5))) == (False, 1.0, 0.0)
    step_time.learn(StepWork(15, 1, 16), 0.3)
    step_time.learn(StepWork(0, 1, 17), 0.1)
    assert not step_time.known
    assert (step_time.most_sequences, step_time.most_prefill_tokens) == (1, 15)


def roofline_s(work: StepWork) -> float:
    """16 ms for the weights, or 60 us a token if that is more; and the KV cache."""
    return max(0.016, 6e-5 * (work.prefill_tokens + work.sequences)) + 2e-9 * work.kv_tokens


def test_it_finds_the_tokens_that_are_free() -> None:
    step_time, random_ = StepTime(), random.Random(3)
    assert step_time.free_tokens == 0
    for _ in range(400):
        rows = random_.randint(5, 120)
        work = StepWork(random_.choice([0, 0, 0, 100, 400, 1900]), rows, rows * random_.randint(50, 4000))
        step_time.learn(work, random_.lognormvariate(0, 0.05) * roofline_s(work))
    assert step_time.free_tokens in (192, 256, 384)
    for work in (StepWork(0, 20, 2000), StepWork(150, 20, 2000), StepWork(1000, 20, 2000)):
        assert step_time.predict(work) == pytest.approx(roofline_s(work), rel=0.12)


def test_steps_that_any_number_of_free_tokens_would_explain_do_not_make_it_forget_them() -> None:
    step_time, random_ = StepTime(), random.Random(3)
    for mixed in (True, False):
        for _ in range(1000):
            tokens = random_.choice([0, 0, 100, 400, 1900] if mixed else [0, 0, 2047])
            work = StepWork(tokens, random_.randint(1, 60) if mixed else 1, 0)
            step_time.learn(work, random_.lognormvariate(0, 0.05) * roofline_s(work))
        assert step_time.free_tokens in (192, 256, 384)


def test_it_finds_the_few_that_are_free_where_arithmetic_is_scarce() -> None:
    """As on an H20: 5.4 ms for the weights, 37 tokens' worth."""
    step_time, random_ = StepTime(), random.Random(6)
    for _ in range(600):
        rows = random_.randint(2, 60)
        work = StepWork(random_.choice([0, 0, 0, 10, 300, 1900]), rows, rows * random_.randint(200, 2000))
        seconds = max(0.0054, 1.45e-4 * (work.prefill_tokens + work.sequences)) + 4.7e-8 * work.kv_tokens
        step_time.learn(work, random_.lognormvariate(0, 0.05) * seconds)
    assert step_time.free_tokens in (32, 48)


def test_on_a_laptop_no_token_is_free() -> None:
    step_time, random_ = StepTime(), random.Random(4)
    for _ in range(1000):
        work = some_work(random_)
        step_time.learn(work, random_.lognormvariate(0, 0.2) * real_s(LAPTOP, work))
        assert step_time.free_tokens == 0


# Hunyuan-Large with its experts cut over 8 GPUs, and DeepSeek's with a shared expert: what 17 ms are read in.
SIXTEEN, MANY = RoutedWeights(16, 1, 16, 1, 0.92), RoutedWeights(256, 8, 32, 8, 0.9)
BY_EXPERTS = pytest.mark.parametrize("experts", [SIXTEEN, MANY], ids=["16, top 1", "256, top 8, 8 ranks"])


def expert_step_s(work: StepWork, experts: RoutedWeights, host_s: float = 0.0) -> float:
    """17 ms for all weights, or 6e-5 s a token if that is longer; KV cache; what the host takes in any case."""
    read_s = 0.017 * (1 - experts.share + experts.share * experts.touched(work.routed_tokens))
    return max(read_s, 6e-5 * (work.prefill_tokens + work.sequences)) + 2e-9 * work.kv_tokens + host_s


def learned_experts(
    experts: RoutedWeights, rows: tuple[int, int], steps: int = 500, host_s: float = 0.0, known: bool = True
) -> StepTime:
    step_time, random_ = StepTime(experts if known else None), random.Random(7)
    for _ in range(steps):
        count = random_.randint(*rows)
        work = StepWork(random_.choice([0, 0, 0, 0, 200, 1900]), count, count * random_.randint(200, 2000))
        step_time.learn(work, random_.lognormvariate(0, 0.05) * expert_step_s(work, experts, host_s))
    return step_time


@BY_EXPERTS
def test_steps_that_read_all_experts_do_not_hide_what_a_step_of_few_would_take(experts: RoutedWeights) -> None:
    """Bulk rows in every step: nothing in the steps tells the reading of experts from the base. The bytes do."""
    for few in (StepWork(0, 1, 1000), StepWork(0, 8, 8000)):
        true_s = expert_step_s(few, experts)
        assert learned_experts(experts, (120, 250)).predict(few) == pytest.approx(true_s, rel=0.25)
        assert learned_experts(experts, (120, 250), known=False).predict(few) > 1.4 * true_s, "not by itself"


@BY_EXPERTS
def test_what_steps_say_of_experts_counts_more_than_bytes(experts: RoutedWeights) -> None:
    """A host that takes as long as the weights, and a third of the experts' bytes for nothing."""
    step_time = learned_experts(experts, (1, 120), host_s=0.017)
    for work in (StepWork(0, 2, 1000), StepWork(0, 30, 30_000), StepWork(0, 110, 100_000)):
        assert step_time.predict(work) == pytest.approx(expert_step_s(work, experts, 0.017), rel=0.07)


def test_where_experts_take_no_time_of_their_own_none_is_found() -> None:
    """As on a CPU, by arithmetic alone."""
    step_time, random_ = StepTime(SIXTEEN), random.Random(8)
    for _ in range(500):
        work = some_work(random_)
        step_time.learn(work, random_.lognormvariate(0, 0.05) * real_s(LAPTOP, work))
    assert step_time.experts_s(64) < 0.2 * step_time.predict(StepWork(0, 1, 100))
    for work in (StepWork(0, 1, 100), StepWork(0, 64, 20000), StepWork(300, 1, 300)):
        assert step_time.predict(work) == pytest.approx(real_s(LAPTOP, work), rel=0.15)


def test_experts_that_other_ranks_tokens_are_routed_to_are_read_too() -> None:
    step_time = learned_experts(SIXTEEN, (1, 120))
    alone, beside = (step_time.predict(StepWork(0, 2, 100, elsewhere_tokens=tokens)) for tokens in (0, 60))
    assert beside - alone == pytest.approx(step_time.experts_s(62) - step_time.experts_s(2))
    assert beside > 3 * alone


def test_four_coefficients_of_a_model_with_experts_are_of_steps_that_read_all() -> None:
    step_time = StepTime(SIXTEEN)
    for rows in (1, 2, 4, 8, 16, 30, 60, 110) * 10:
        step_time.learn(StepWork(0, rows, 50 * rows), expert_step_s(StepWork(0, rows, 50 * rows), SIXTEEN))
    base, *_ = step_time.coefficients_s
    assert base == pytest.approx(0.017, rel=0.02)
    assert StepTime().experts_s(100) == 0
