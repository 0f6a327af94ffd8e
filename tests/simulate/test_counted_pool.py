"""Counted blocks, by themselves and against vLLM's own scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hycluster.gateway.router import POLICIES
from hycluster.settings.model import Colocation, Model
from hycluster.settings.simulated import Simulated
from hycluster.simulate.fast import serve_fast
from hycluster.simulate.machine import Machine, simulated_machine
from hycluster.simulate.traces import HASH_TOKENS, TraceRequest

# Its KV cache holds 64 blocks of a trace.
GPU = Simulated(
    step_base_s=0.016, prefill_token_s=6e-5, decode_token_s=6e-5, kv_token_s=2e-9, max_num_seqs=32,
    max_num_batched_tokens=1024, kv_blocks=2048, max_model_len=16384,
)  # fmt: skip
EXACT_POLICIES = ("least_outstanding_tokens", "predicted_ttft", "lmetric")


def machine(simulated: Simulated = GPU, **engine: Any) -> Machine:
    return simulated_machine(Model(name="m", source="nowhere", engine=engine), simulated, "test")


def chats(sessions: int, seconds: float, seed: int = 0) -> list[TraceRequest]:
    """Conversations that grow turn by turn, over one system prompt."""
    rng, found, names = random.Random(seed), list[TraceRequest](), 1000
    for _ in range(sessions):
        at_s, ids = rng.random() * seconds, [1]
        for _ in range(rng.randrange(1, 6)):
            for _ in range(rng.randrange(1, 4)):
                names += 1
                ids.append(names)
            tail = rng.randrange(1, HASH_TOKENS)
            found.append(
                TraceRequest(at_s, len(ids) * HASH_TOKENS + tail, rng.randrange(2, 60), (*ids, names + 1_000_000))
            )
            at_s += 1 + rng.expovariate(0.2)
    return sorted(found, key=lambda request: request.at_s)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_numbers(policy: str) -> None:
    trace = chats(40, 30)
    first, second = (serve_fast(machine(), trace, replicas=3, policy=policy, seed=5)[1] for _ in range(2))
    for each in (first, second):
        assert each.pop("decision_us").keys() == {"p50", "p99"}
    assert first == second
    assert (first["requests"], first["failed"]) == (len(trace), 0)
    assert 0 < first["prefix_hit_tokens"] <= first["bounds"]["unlimited_hit_tokens"]
    assert first["replica_hours"] == pytest.approx(3 * first["duration_s"] / 3600)


def test_what_is_too_long_fails() -> None:
    trace = [TraceRequest(0.0, 16380, 5), TraceRequest(0.0, 16380, 4)]
    _, found = serve_fast(machine(), trace, replicas=1, policy="predicted_ttft", seed=0)
    assert (found["requests"], found["failed"], found["prompt_tokens"]) == (2, 1, 16380)


def test_without_prefix_caching_there_are_no_hits() -> None:
    found = serve_fast(
        machine(enable_prefix_caching=False), chats(20, 30), replicas=2, policy="predicted_ttft", seed=0
    )[1]
    assert found["prefix_hit_tokens"] == 0


def test_knowing_what_is_cached_beats_load_alone() -> None:
    trace = chats(150, 60)
    by_load, ours = (
        serve_fast(machine(), trace, replicas=4, policy=policy, seed=0)[1]
        for policy in ("least_outstanding_tokens", "predicted_ttft")
    )
    assert ours["prefix_hit_tokens"] > 1.5 * by_load["prefix_hit_tokens"]
    assert ours["prefix_hit_tokens"] > 0.8 * ours["bounds"]["pooled_lru_hit_tokens"]
    assert ours["ttft_s"]["mean"] < by_load["ttft_s"]["mean"]


@pytest.mark.usefixtures("vllm_imported")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", EXACT_POLICIES)
def test_both_fidelities_say_the_same(policy: str, asynchronous: bool) -> None:
    """vLLM's scheduler, which has blocks of 16 tokens and preempts, and counts of blocks of 512."""
    from hycluster.simulate.run import Simulation

    trace, made = chats(100, 60, seed=3), machine(async_scheduling=asynchronous)
    _, exact = Simulation(made, Colocation(enabled=False), 3, policy, 0).serve(trace, None)
    _, fast = serve_fast(made, trace, replicas=3, policy=policy, seed=0)
    assert fast["bounds"] == exact["bounds"]
    assert fast["prefix_hit_tokens"] == pytest.approx(exact["prefix_hit_tokens"], rel=0.05)
    for kind in ("ttft_s", "tpot_s"):
        assert fast[kind]["mean"] == pytest.approx(exact[kind]["mean"], rel=0.05)
        assert fast[kind]["p50"] == pytest.approx(exact[kind]["p50"], rel=0.1)
    assert fast["duration_s"] == pytest.approx(exact["duration_s"], rel=0.02)
    assert fast["busy_share"] == pytest.approx(exact["busy_share"], rel=0.1)


@pytest.mark.usefixtures("vllm_imported")
def test_where_nothing_is_left_to_the_router_they_are_equal() -> None:
    from hycluster.simulate.run import Simulation

    trace = chats(25, 60, seed=4)
    exact, _ = Simulation(machine(), Colocation(enabled=False), 1).serve(trace, None)
    fast, _ = serve_fast(machine(), trace, replicas=1, policy="least_outstanding_tokens", seed=0)
    off = [a.ttft_s - b.ttft_s for a, b in zip(exact.served, fast.served, strict=True)]
    assert max(map(abs, off)) < 0.02, "a step"
