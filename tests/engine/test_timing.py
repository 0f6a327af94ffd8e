from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hycluster.engine.messages import EngineCoreOutput, EngineCoreRequest, FinishReason, SamplingParams
from hycluster.engine.timing import LOWEST_TOKEN, SimulatedScheduler, StepResult
from hycluster.errors import InvalidInput
from hycluster.settings.simulated import Simulated


def scheduler(**changes: Any) -> SimulatedScheduler:
    return SimulatedScheduler(Simulated(**{"max_model_len": 256, "kv_blocks": 64} | changes))


def request(
    request_id: str = "r", prompt: list[int] | int = 4, *, priority: int = 0, arrival: float = 0.0, **params: Any
) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(range(prompt)) if isinstance(prompt, int) else prompt,
        sampling_params=SamplingParams(**params),
        arrival_time=arrival,
        priority=priority,
    )


def run(engine: SimulatedScheduler) -> list[StepResult]:
    """Step until all is done, in virtual time."""
    now, steps = 0.0, []
    while engine.has_work:
        steps.append(engine.step(now))
        now = steps[-1].end_s
        assert len(steps) < 100_000, "no progress"
    return steps


def outputs_of(steps: list[StepResult], request_id: str = "r", client: int = 0) -> list[EngineCoreOutput]:
    return [o for step in steps for o in step.outputs.get(client, ()) if o.request_id == request_id]


def text_of(steps: list[StepResult], request_id: str = "r") -> list[int]:
    return [token for output in outputs_of(steps, request_id) for token in output.new_token_ids]


def finished_at(steps: list[StepResult], request_id: str) -> int:
    return next(
        number
        for number, step in enumerate(steps)
        for outputs in step.outputs.values()
        for output in outputs
        if output.request_id == request_id and output.finish_reason is not None
    )


def test_step_time_is_the_sum_of_its_parts() -> None:
    engine = scheduler(step_base_s=1.0, prefill_token_s=0.25, decode_token_s=0.5)
    engine.add(0, request("a", 8, max_tokens=2))
    engine.add(0, request("b", 4, max_tokens=3))
    first, second, third = run(engine)
    assert (first.prefill_tokens, first.decode_tokens, first.duration_s) == (12, 0, 1.0 + 12 * 0.25)
    assert (second.prefill_tokens, second.decode_tokens, second.duration_s) == (0, 2, 1.0 + 2 * 0.5)
    assert (third.prefill_tokens, third.decode_tokens, third.duration_s) == (0, 1, 1.5)
    assert third.end_s == 4.0 + 2.0 + 1.5


def test_an_idle_step_takes_no_time() -> None:
    assert scheduler().step(5.0) == StepResult(end_s=5.0, duration_s=0.0, prefill_tokens=0, decode_tokens=0)


def test_prompts_are_cut_to_the_token_budget() -> None:
    engine = scheduler(max_num_batched_tokens=10)
    engine.add(0, request("a", 24, max_tokens=3))
    engine.add(0, request("b", 3, max_tokens=1))
    steps = run(engine)
    assert [(s.prefill_tokens, s.decode_tokens) for s in steps] == [(10, 0), (10, 0), (7, 0), (0, 1), (0, 1)]
    assert [len(step.outputs.get(0, ())) for step in steps] == [0, 0, 2, 1, 1]


def test_the_last_token_of_a_chunked_prompt_is_prefill() -> None:
    engine = scheduler(max_num_batched_tokens=10)
    engine.add(0, request("a", 11, max_tokens=1))
    assert [(s.prefill_tokens, s.decode_tokens) for s in run(engine)] == [(10, 0), (1, 0)]


def test_batch_limit() -> None:
    engine = scheduler(max_num_seqs=2)
    for name in "abc":
        engine.add(0, request(name, max_tokens=2))
    engine.step(0.0)
    assert (engine.load().running, engine.load().waiting) == (2, 1)
    steps = run(engine)
    assert finished_at(steps, "a") == finished_at(steps, "b") < finished_at(steps, "c")


def test_priority_then_arrival() -> None:
    engine = scheduler(max_num_seqs=1)
    engine.add(0, request("batch", max_tokens=1, priority=10, arrival=0))
    engine.add(0, request("late", max_tokens=1, priority=0, arrival=2))
    engine.add(0, request("early", max_tokens=1, priority=0, arrival=1))
    done = [output.request_id for step in run(engine) for output in step.outputs[0]]
    assert done == ["early", "late", "batch"]


def test_the_lowest_priority_is_preempted_and_loses_nothing() -> None:
    # Each needs 4 blocks in the end; there are 6.
    small = {"kv_blocks": 6, "block_size_tokens": 4, "max_model_len": 24}
    engine = scheduler(**small)
    engine.add(0, request("batch", 8, max_tokens=8, priority=10, arrival=0))
    engine.add(0, request("online", 8, max_tokens=8, priority=0, arrival=1))
    steps = run(engine)
    assert {name for step in steps for name in step.preempted} == {"batch"}
    assert finished_at(steps, "online") < finished_at(steps, "batch")
    alone = scheduler(**small)
    alone.add(0, request("r", 8, max_tokens=8))
    expected = text_of(run(alone))
    assert text_of(steps, "batch") == text_of(steps, "online") == expected
    # What the preempted one had is computed again: prompt and output so far.
    assert sum(step.prefill_tokens for step in steps) > 16
    assert engine.free_blocks == 6


def test_of_equal_priority_the_latest_is_preempted() -> None:
    engine = scheduler(kv_blocks=6, block_size_tokens=4, max_model_len=24)
    engine.add(0, request("late", 8, max_tokens=8, arrival=2))
    engine.add(0, request("early", 8, max_tokens=8, arrival=1))
    assert {name for step in run(engine) for name in step.preempted} == {"late"}


def test_a_request_waits_until_all_its_prompt_fits() -> None:
    engine = scheduler(kv_blocks=8, block_size_tokens=4, max_model_len=32, max_num_batched_tokens=4)
    engine.add(0, request("a", 16, max_tokens=4))
    engine.add(0, request("b", 28, max_tokens=1, arrival=1))
    steps = run(engine)
    assert all(not step.preempted for step in steps)
    assert finished_at(steps, "a") < finished_at(steps, "b")


def test_abort_frees_blocks_at_once() -> None:
    engine = scheduler()
    engine.add(0, request("a", 40, max_tokens=50))
    engine.add(0, request("b", 40, max_tokens=50))
    engine.add(1, request("a", 40, max_tokens=50))
    engine.step(0.0)
    assert engine.free_blocks == 64 - 3 * 3
    engine.abort(0, ["a", "unknown"])
    assert engine.free_blocks == 64 - 2 * 3
    engine.abort(0)
    assert engine.free_blocks == 64 - 3
    step = engine.step(0.0)
    assert {client: [o.request_id for o in outputs] for client, outputs in step.outputs.items()} == {1: ["a"]}


def test_abort_of_a_waiting_request() -> None:
    engine = scheduler()
    engine.add(0, request("a"))
    engine.abort(0, ["a"])
    assert not engine.has_work
    assert engine.load().waiting == 0


def test_clients_are_kept_apart() -> None:
    engine = scheduler()
    for client in (0, 1):
        engine.add(client, request("same", max_tokens=1))
    (step,) = run(engine)
    assert [len(step.outputs[client]) for client in (0, 1)] == [1, 1]


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 1), (5, 5), (None, 28), (1000, 28)])
def test_ends_by_length(max_tokens: int | None, expected: int) -> None:
    engine = scheduler(max_model_len=32)
    engine.add(0, request(prompt=4, max_tokens=max_tokens))
    outputs = outputs_of(run(engine))
    assert len(outputs) == expected
    assert [output.finish_reason for output in outputs] == [None] * (expected - 1) + [FinishReason.LENGTH]


def test_ends_by_stop_token_and_end_of_sequence() -> None:
    engine = scheduler()
    engine.add(0, request(max_tokens=9))
    text = text_of(run(engine))
    engine.add(0, request(max_tokens=9, stop_token_ids=[text[3]]))
    last = outputs_of(run(engine))[-1]
    assert (last.new_token_ids, last.finish_reason, last.stop_reason) == ([text[3]], FinishReason.STOP, text[3])
    engine.add(0, request(max_tokens=9, eos_token_id=text[2]))
    outputs = outputs_of(run(engine))
    assert len(outputs) == 3
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, None)


def test_min_tokens_holds_stop_tokens_back() -> None:
    engine = scheduler()
    engine.add(0, request(max_tokens=9))
    text = text_of(run(engine))
    stop = text[1]
    engine.add(0, request(max_tokens=9, min_tokens=4, eos_token_id=stop, all_stop_token_ids=frozenset({stop})))
    held = text_of(run(engine))
    assert held[0] == text[0]
    assert stop not in held[:4]
    assert len(held) >= 4


def test_min_tokens_in_a_vocabulary_of_stop_tokens_still_ends() -> None:
    engine = scheduler(vocab_size=1)
    engine.add(0, request(max_tokens=9, min_tokens=4, all_stop_token_ids=frozenset({0})))
    assert text_of(run(engine)) == [0] * 9


def test_tokens_stay_clear_of_special_ones() -> None:
    engine = scheduler(vocab_size=2000)
    engine.add(0, request(max_tokens=200))
    text = text_of(run(engine))
    assert all(LOWEST_TOKEN <= token < 2000 for token in text)
    assert len(set(text)) > 100


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (request(prompt=[]), "not empty"),
        (request(prompt=256), "256 tokens; must be below 256"),
        (request(prompt=[-1]), "unsigned"),
        (request(prompt=[2**32]), "unsigned"),
        (request(logprobs=1), "logprobs"),
        (request("taken"), "taken"),
        (EngineCoreRequest(request_id="p", prompt_token_ids=[1], arrival_time=0.0, pooling_params={}), "generates"),
    ],
)
def test_what_it_cannot_do_is_refused(wrong: EngineCoreRequest, said: str) -> None:
    engine = scheduler()
    engine.add(0, request("taken"))
    with pytest.raises(InvalidInput, match=said):
        engine.add(0, wrong)
    assert engine.load().waiting == 1


tokens = st.lists(st.integers(0, 2000), min_size=1, max_size=40)


@given(prompt=tokens, cut=st.integers(0, 20), min_tokens=st.integers(0, 20), data=st.data())
def test_another_engine_continues_with_the_same_tokens(
    prompt: list[int], cut: int, min_tokens: int, data: st.DataObject
) -> None:
    """What failover stands on: prompt + tokens so far, sent elsewhere, gives the rest of the same text."""
    stops = frozenset(data.draw(st.sets(st.integers(0, 30), max_size=5)))

    def generate(prompt: list[int], max_tokens: int, min_tokens: int) -> list[int]:
        engine = scheduler(vocab_size=30, max_num_batched_tokens=data.draw(st.integers(1, 64)))
        limits: dict[str, Any] = {"max_tokens": max_tokens, "min_tokens": min_tokens}
        engine.add(0, request(prompt=prompt, **limits, stop_token_ids=list(stops), all_stop_token_ids=stops))
        return text_of(run(engine))

    whole = generate(prompt, 20, min_tokens)
    cut = min(cut, len(whole) - 1)
    rest = generate(prompt + whole[:cut], 20 - cut, max(0, min_tokens - cut))
    assert whole[:cut] + rest == whole


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 30),
    kv_blocks=st.integers(16, 40),
    max_num_seqs=st.integers(1, 12),
    budget=st.integers(1, 80),
)
def test_limits_hold_and_all_ends_under_any_load(
    seed: int, requests: int, kv_blocks: int, max_num_seqs: int, budget: int
) -> None:
    rng = random.Random(seed)
    engine = scheduler(
        kv_blocks=kv_blocks,
        block_size_tokens=4,
        max_model_len=64,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    expected: dict[str, int] = {}
    got: dict[str, int] = {}
    now = 0.0
    for number in range(requests * 400):
        if number < requests:
            prompt, most = rng.randint(1, 60), rng.randint(1, 40)
            expected[str(number)] = min(most, 64 - prompt)
            engine.add(0, request(str(number), prompt, max_tokens=most, priority=rng.choice([0, 10]), arrival=number))
        gone = str(rng.randrange(requests * 20))
        if gone in expected and got.get(gone, 0) < expected[gone]:
            engine.abort(0, [gone])
            del expected[gone]
            got.pop(gone, None)
        step = engine.step(now)
        now = step.end_s
        assert 0 <= engine.free_blocks <= kv_blocks
        assert engine.load().running <= max_num_seqs
        assert engine.load().kv_usage == (kv_blocks - engine.free_blocks) / kv_blocks
        assert step.prefill_tokens + step.decode_tokens <= budget
        for output in step.outputs.get(0, ()):
            got[output.request_id] = got.get(output.request_id, 0) + len(output.new_token_ids)
        if number >= requests and not engine.has_work:
            break
    assert got == expected
    assert engine.free_blocks == kv_blocks


def test_the_same_calls_give_the_same_steps() -> None:
    def steps() -> list[StepResult]:
        engine = scheduler(kv_blocks=20, max_num_batched_tokens=32)
        rng = random.Random(5)
        for number in range(20):
            engine.add(number % 3, request(str(number), rng.randint(1, 200), max_tokens=40, arrival=number))
        return run(engine)

    assert steps() == steps()
