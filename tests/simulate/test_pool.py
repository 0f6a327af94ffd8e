"""Traces on vLLM's own scheduler, in virtual time."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from hycluster.core import Priority
from hycluster.engine.step_time import StepWork
from hycluster.settings.model import Colocation, Model
from hycluster.settings.simulated import Simulated
from hycluster.simulate.traces import TraceRequest, made_trace, scaled

if TYPE_CHECKING:
    from hycluster.simulate.run import Simulation

pytestmark = pytest.mark.usefixtures("vllm_imported")

# About a large model on GPUs: a step reads the weights, some hundred tokens more make it longer.
GPU = Simulated(
    step_base_s=0.016, prefill_token_s=6e-5, decode_token_s=6e-5, kv_token_s=2e-9, max_num_seqs=32,
    max_num_batched_tokens=1024, kv_blocks=8192, max_model_len=16384,
)  # fmt: skip


def simulation(simulated: Simulated = GPU, colocation: Colocation | None = None, **changed: Any) -> Simulation:
    from hycluster.simulate.machine import simulated_machine
    from hycluster.simulate.run import Simulation

    engine = changed.pop("engine", {})
    machine = simulated_machine(Model(name="m", source="nowhere", engine=engine), simulated, "test")
    return Simulation(machine, colocation or Colocation(), **changed)


def test_a_lone_request_takes_its_steps() -> None:
    outcome, found = simulation().serve([TraceRequest(0.0, 1500, 11)], None)
    (served,) = outcome.served
    # 1024 tokens, 476 tokens, ten of one.
    prefill = 2 * 0.016 + 6e-5 * 1500 + 2e-9 * (1024 + 1500)
    assert served.ttft_s == pytest.approx(prefill)
    assert served.tpot_s == pytest.approx(0.016 + 6e-5 + 2e-9 * 1505.5, rel=1e-4)
    assert (found["requests"], found["failed"], found["prompt_tokens"], found["steps"]) == (1, 0, 1500, 12)
    assert found["ttft_s"]["p99"] == found["ttft_s"]["mean"] == served.ttft_s


def test_a_step_is_scheduled_while_the_one_before_is_computed() -> None:
    """What comes then waits for both."""
    requests = [TraceRequest(0.0, 16, 100), TraceRequest(0.02, 16, 2)]
    waits = {}
    for asynchronous in (False, True):
        outcome, _ = simulation(engine={"async_scheduling": asynchronous}).serve(requests, None)
        waits[asynchronous] = outcome.served[1].ttft_s
    step = 0.016 + 6e-5
    assert waits[True] - waits[False] == pytest.approx(step, rel=0.05)


def test_prefixes_are_found_in_the_cache() -> None:
    ids = tuple(range(4))
    _, found = simulation().serve([TraceRequest(float(at), 2048, 4, ids) for at in range(3)], None)
    assert found["prefix_hit_tokens"] == 2 * (2048 - 16), "all but the block that has the last token"
    assert found["bounds"] == {"pooled_lru_hit_tokens": 2 * 2047, "unlimited_hit_tokens": 2 * 2047}


def test_what_is_too_long_fails() -> None:
    _, found = simulation().serve([TraceRequest(0.0, 16380, 5), TraceRequest(0.0, 16380, 4)], None)
    assert (found["requests"], found["failed"], found["prompt_tokens"]) == (2, 1, 16380)


def test_replicas_share_a_trace() -> None:
    requests = made_trace(20, 6, seed=3)
    one, two = (simulation(replicas=count).serve(requests, None)[1] for count in (1, 2))
    assert two["ttft_s"]["p99"] < one["ttft_s"]["p99"]
    assert two["load_p99_over_mean"] < 1.2
    assert two["replica_hours"] == pytest.approx(2 * two["duration_s"] / 3600)


def test_the_same_seed_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from hycluster.simulate import pool
    from hycluster.simulate.bulk import BulkJob

    monkeypatch.setattr(pool, "LEAD_S", 2.0)
    # Short answers: the job goes on beside the last one.
    requests = [dataclasses.replace(each, output_tokens=8) for each in made_trace(3, 4, seed=3)]
    first, second = (simulation(replicas=2, seed=5).serve(requests, BulkJob(100, 20))[1] for _ in range(2))
    assert all(each.pop("decision_us").keys() == {"p50", "p99"} for each in (first, second))
    assert first == second


def test_a_job_with_an_end_is_done() -> None:
    from hycluster.simulate.bulk import BulkJob

    _, found = simulation().serve(made_trace(10, 2, seed=1), BulkJob(100, 20, 300))
    assert found["bulk"]["rows"] == 300
    assert found["bulk"]["over_s"] <= found["duration_s"]


def test_a_request_that_can_never_run_is_said_and_not_waited_for() -> None:
    from hycluster.simulate.bulk import BulkRows
    from hycluster.simulate.engine import StuckEngine

    simulated = simulation()
    pool = simulated._pool(Colocation())
    rows = BulkRows(itertools.repeat(TraceRequest(0.0, 15000, 1)), 1, endless=True, priority=Priority.ONLINE)
    pool.engines[0].scheduler.kv_cache_manager.block_pool.get_new_blocks(8000)
    with pytest.raises(StuckEngine, match="KV cache too small"):
        pool.run([], rows, 10)


def test_load_is_a_share_of_the_capacity() -> None:
    simulated = simulation(colocation=Colocation(enabled=False))
    requests = made_trace(30, 2, seed=2)
    load = simulated.load_of(requests)
    assert 0.05 < load < 1
    assert simulated.load_of(scaled(requests, 2, 0)) == pytest.approx(2 * load, rel=0.1)
    assert simulated.load_of(scaled(requests, simulated.scale_for(requests, 0.6), 0)) == pytest.approx(0.6, rel=0.1)


def memory_bound(work: StepWork) -> float:
    """As on a GPU: the weights are read for 16 ms, meanwhile some 270 tokens are computed."""
    return max(0.016, 6e-5 * (work.prefill_tokens + work.sequences)) + 2e-9 * work.kv_tokens


def test_online_callers_hardly_feel_a_job_and_it_gets_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the policy on a made trace; ``bench/simulate.py`` has it on real ones."""
    from hycluster.simulate import run
    from hycluster.simulate.bulk import BulkJob
    from hycluster.simulate.run import PRIORITY_ONLY

    # A job alone does the same all the time.
    monkeypatch.setattr(run, "ALONE_S", 20.0)
    job, engine = BulkJob(300, 60), {"async_scheduling": True}
    ours, vllm = (
        dataclasses.replace(each, machine=dataclasses.replace(each.machine, step_time=memory_bound))
        for each in (simulation(colocation=each, engine=engine) for each in (Colocation(), PRIORITY_ONLY))
    )
    requests = made_trace(20, 2, seed=4)
    requests = scaled(requests, vllm.scale_for(requests, 0.6), 0)
    compared = vllm.compare(requests, job)
    alone = compared["alone"]
    _, beside = ours.serve(requests, job)
    for kind in ("ttft_s", "tpot_s"):
        assert beside[kind]["p99"] <= 1.1 * alone[kind]["p99"]
    assert beside["bulk"]["tokens_per_s"] >= 0.9 * compared["left_over_tokens_per_s"]
    assert 0 < beside["bulk"]["slowdown"] <= 1.05 * Colocation().max_slowdown
    _, without = vllm.serve(requests, job)
    assert without["ttft_s"]["p99"] > 1.5 * alone["ttft_s"]["p99"], "vLLM's own does as well: read its release notes"
