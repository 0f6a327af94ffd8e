"""A trace on engines by their counts, without vLLM."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from hycluster.simulate.choice import Choice
from hycluster.simulate.counted_pool import FastPool
from hycluster.simulate.figures import trace_figures
from hycluster.simulate.machine import Machine
from hycluster.simulate.outcome import TraceOutcome
from hycluster.simulate.traces import TraceRequest


def serve_fast(
    machine: Machine, requests: Sequence[TraceRequest], *, replicas: int, policy: str, seed: int
) -> tuple[TraceOutcome, dict[str, Any]]:
    """Serve a trace; the figures are as those of :meth:`hycluster.simulate.run.Simulation.serve`."""
    # A trace stays: looking through it for garbage, again and again, takes a good part of the time.
    gc.freeze()
    sizes = machine.sizes
    longest = min(machine.max_model_len, machine.kv_tokens)
    pool = FastPool(replicas, sizes, machine.step_time, machine.step_cost, Choice(policy, seed), longest)
    outcome = pool.run(requests)
    return outcome, trace_figures(outcome, machine, replicas)
